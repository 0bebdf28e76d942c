"""One handoff on D's side as a state machine: facts in, actions out; no clock, no I/O.

    WAIT ──reserved──> RESERVED ──a read is posted──> READ ──words equal──> VERIFIED ──> RUN
      ^───reclaimed (M3)──┘                             │                      │
      └──── revoked, refused, lost, late, aborted ──────┴──────────────────────┴──> OVER

docs/protocol.md has the table of states, owners of memory and timers. Whoever drives it calls one
method for each fact, in any order the world allows, carries out what it returns in that order,
and calls `tick` at `deadline`. Facts that come too late are answered by giving back what they
brought, or by nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from contracts.errors import ClaimRefused, FenceBroken, TransferFailed, TransferGone
from contracts.events import TokensOut
from contracts.handoff import ClaimGranted
from contracts.ids import Incarnation, TransferId


class HandoffState(StrEnum):
    """How far a handoff is; also the words of metrics and logs."""

    WAIT = "wait"  # holds nothing (M2)
    RESERVED = "reserved"  # holds a reservation into which nothing was posted
    READ = "read"  # a transfer into the reservation was posted
    VERIFIED = "verified"  # all read, fence equal, P released: on its way to the engine
    RUN = "run"  # the reservation is the engine's
    OVER = "over"  # holds nothing; what a posted read may still write is quarantined


class HandoffEnded(Exception):
    """P says that there is nothing to decode."""


class AbortedAtP(TransferGone):
    """P took the transfer back because the router aborted the request there."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Take or open the link to P within `timeout_s`: `linked` or `unreachable`."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class SendClaim:
    """Claim over the link; the same nonce each time (C2)."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Ask for memory: `reserved` or `no_memory`. Numbers count up."""

    number: int


@dataclass(frozen=True, slots=True)
class PostRead:
    """Read blocks `first` to `end` of the prompt.

    The last one comes with `fence`: when all of it is here, read the generation words of the
    blocks from there to `end` (F5). To be answered by `terminal` always, and by `read_done`,
    `words` (if fenced) or `read_failed` before or after that; by `reclaimed` alone if the
    memory is gone and nothing was posted.
    """

    number: int
    first: int
    end: int
    fence: int | None


@dataclass(frozen=True, slots=True)
class SendReading:
    """Tell P that reading begins (L6)."""


@dataclass(frozen=True, slots=True)
class SendRelease:
    """Tell P that D is done with its blocks, over this link or the next (L4)."""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Give reservation `number` up, now; blocks of the reads `posted` are quarantined (Q1)."""

    number: int
    posted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EndQuarantine:
    """Nothing of read `number`, given back before, can write any more."""

    number: int


@dataclass(frozen=True, slots=True)
class Join:
    """Give the reservation to the engine as sequences: `joined`, or `fail`."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The handoff is over; `error` None: it has joined. Exactly once, the last but quarantine."""

    error: Exception | None


Action = (
    Connect
    | SendClaim
    | Reserve
    | PostRead
    | SendReading
    | SendRelease
    | GiveBack
    | EndQuarantine
    | Join
    | Finish
)
Actions = list[Action]


@dataclass(frozen=True, slots=True)
class HandoffSpec:
    """What a handoff is about, and its times in seconds.

    `connect_s`: for the first link. `silence_s`: P shows no sign of life. `stuck_s`: it lives, and
    this handoff gets no further.
    """

    transfer_id: TransferId
    incarnation: Incarnation  # of the P that gave the params
    num_tokens: int  # of the prompt
    num_blocks: int  # that hold them
    block_size: int  # tokens
    max_read_blocks: int  # of one read: its time limit is for that much
    connect_s: float
    silence_s: float
    stuck_s: float


@dataclass(slots=True)
class _Posting:
    """A read that may write the reservation's blocks until it is terminal."""

    number: int
    end: int  # block of the prompt, exclusive
    given_back: bool = False


@dataclass(slots=True, eq=False)
class HandoffMachine:
    """See the module. `first_tokens` are P's, once known; `hit_blocks` were D's own."""

    spec: HandoffSpec
    state: HandoffState = HandoffState.WAIT
    first_tokens: tuple[TokensOut, ...] = ()
    hit_blocks: int = 0
    grant: ClaimGranted | None = None
    _linked: bool = False
    _connecting: bool = False
    _ready_tokens: int = 0
    _reservation: int | None = None
    _asked: int = 0  # the last number of Reserve
    _asking: bool = False
    _done: int = 0  # blocks at hand: hits and those read
    _reads: int = 0  # the last number of PostRead
    _reading: _Posting | None = None  # the one whose result is awaited
    _open: dict[int, _Posting] = field(default_factory=dict[int, _Posting])
    _claimed: bool = False  # P may hold a claim of ours
    _reading_told: bool = False
    _progress_at: float = 0.0

    # -- life -------------------------------------------------------------------------------

    def start(self, now: float) -> Actions:
        """Begin."""
        self._progress_at = now
        return self._connect(self.spec.connect_s)

    def abort(self) -> Actions:
        """The router's abort, or the end of its session."""
        return self._finish(TransferGone("aborted"))

    def fail(self, error: Exception) -> Actions:
        """It cannot go on here; `error` is its outcome."""
        return self._finish(error)

    def deadline(self, alive_at: float) -> float | None:
        """When `tick` is due; `alive_at`: P's last acknowledged sign of life. None: not now."""
        if not self._waits_for_p:
            return None
        return min(
            max(self._progress_at, alive_at) + self.spec.silence_s,
            self._progress_at + self.spec.stuck_s,
        )

    def tick(self, now: float, alive_at: float) -> Actions:
        """Time has passed."""
        due = self.deadline(alive_at)
        if due is None or now < due:
            return []
        return self._finish(TransferFailed(self._late()))

    @property
    def _over(self) -> bool:
        return self.state in (HandoffState.RUN, HandoffState.OVER)

    @property
    def _waits_for_p(self) -> bool:
        """Whether the next step is P's: memory, reads and the link have limits of their own."""
        if self._over or self.state is HandoffState.VERIFIED or not self._linked:
            return False
        return not self._asking and self._reading is None

    def _late(self) -> str:
        if self.grant is None:
            return "P did not answer the claim in time"
        if self._ready_tokens < self.spec.num_tokens:
            return "P computed nothing in time"
        return "token 1 did not come in time"

    # -- the link ---------------------------------------------------------------------------

    def linked(self, incarnation: Incarnation, now: float) -> Actions:
        """The link is open."""
        if self._over or not self._connecting:
            return []
        self._connecting = False
        if incarnation != self.spec.incarnation:
            return self._finish(TransferFailed("P has restarted since it gave the params"))
        self._linked = True
        if self.grant is None:  # a link that comes and goes is no progress
            self._progress_at = now
        self._claimed = True
        return [SendClaim()]

    def unreachable(self, error: Exception) -> Actions:
        """The link could not be opened in time."""
        if self._over or not self._connecting:
            return []
        self._connecting = False
        return self._finish(error)

    def link_lost(self, lease_left_s: float) -> Actions:
        """The link is lost. While the lease may stand, it is claimed anew (L3)."""
        if self._over or self.state is HandoffState.VERIFIED or not self._linked:
            return []
        self._linked = False
        if lease_left_s <= 0:
            return self._finish(TransferFailed("the peer link is lost"))
        return self._connect(lease_left_s)

    def _connect(self, timeout_s: float) -> Actions:
        self._connecting = True
        return [Connect(timeout_s)]

    # -- what P says ------------------------------------------------------------------------

    def granted(self, grant: ClaimGranted, now: float) -> Actions:
        """P grants the claim, or grants it again."""
        if self._over:
            return []
        if self.grant is None:
            spec = self.spec
            if grant.num_tokens != spec.num_tokens:
                return self._finish(ClaimRefused("the transfer's prompt is of another length"))
            need = spec.num_blocks
            if len(grant.block_ids) != need or len(grant.generations) != need:
                granted = len(grant.block_ids)
                return self._finish(ClaimRefused(f"{need} blocks expected, {granted} granted"))
            self.grant = grant
        elif (grant.block_ids, grant.generations) != (self.grant.block_ids, self.grant.generations):
            return self._finish(ClaimRefused("P grants other blocks than before"))
        self.first_tokens = self.first_tokens or grant.first_tokens
        return self.chunk_ready(grant.ready_tokens, now)

    def denied(self, error: Exception) -> Actions:
        """P does not grant the claim."""
        self._claimed = False
        return self._finish(error)

    def chunk_ready(self, ready_tokens: int, now: float) -> Actions:
        """That many prompt tokens are complete in P's memory (F2)."""
        self._ready_tokens = max(self._ready_tokens, ready_tokens)
        self._progress_at = now
        return self._advance()

    def first_tokens_came(self, tokens: tuple[TokensOut, ...], now: float) -> Actions:
        """Token 1 of every choice."""
        self.first_tokens = self.first_tokens or tokens
        self._progress_at = now
        return self._advance()

    def revoked(self, reason: str) -> Actions:
        """P took the transfer back (L5, L6)."""
        if self.state is HandoffState.VERIFIED:  # all was read before
            return []
        if reason == "ended":
            return self._finish(HandoffEnded())
        kind = AbortedAtP if reason == "aborted" else TransferGone
        return self._finish(kind(f"P took the transfer back: {reason}"))

    # -- memory -----------------------------------------------------------------------------

    def reserved(self, number: int, hit_blocks: int) -> Actions:
        """The memory is there; its first blocks were in D's own prefix cache."""
        if self._over or not self._asking or number != self._asked:
            return [GiveBack(number, ())]
        self._asking = False
        self._reservation = number
        self.hit_blocks = self._done = hit_blocks
        self.state = HandoffState.RESERVED
        return self._advance()

    def no_memory(self, number: int, error: Exception) -> Actions:
        """It did not become free in time."""
        if self._over or number != self._asked:
            return []
        self._asking = False
        return self._finish(error)

    def reclaimed(self, number: int) -> Actions:
        """The engine took the reservation back, with nothing posted into it (M3): wait again."""
        if self._over or number != self._reservation:
            return []
        if self._reading is not None:  # asked for, and not posted
            del self._open[self._reading.number]
            self._reading = None
        assert not self._open, "a reservation was taken back under a posted read"
        self._reservation = None
        self.state = HandoffState.WAIT
        return self._advance()

    # -- reads ------------------------------------------------------------------------------

    def read_done(self, number: int, now: float) -> Actions:
        """All blocks of that read are here."""
        posting = self._result(number)
        return [] if posting is None else self._read_to(posting.end, now)

    def words(self, number: int, found: Sequence[int], now: float) -> Actions:
        """That read is done, and all words were read after it: compared here (F7)."""
        posting = self._result(number)
        if posting is None:
            return []
        assert self.grant is not None
        granted = self.grant.generations[self.hit_blocks :]
        if tuple(found) != granted:
            changed = sum(a != b for a, b in zip(found, granted, strict=True))
            return self._finish(
                FenceBroken(f"{changed} of {len(granted)} blocks changed hands while being read")
            )
        return self._read_to(posting.end, now)

    def _read_to(self, end: int, now: float) -> Actions:
        self._done = end
        self._progress_at = now
        return self._advance()

    def read_failed(self, number: int, error: Exception) -> Actions:
        """That read failed or was given up; parts of it may still land."""
        return [] if self._result(number) is None else self._finish(error)

    def terminal(self, number: int) -> Actions:
        """Nothing of that read can write any more (Q1)."""
        posting = self._open.pop(number, None)
        given_back = posting is not None and posting.given_back
        return [EndQuarantine(number)] if given_back else []

    def _result(self, number: int) -> _Posting | None:
        """The read that is awaited, if it is `number`; it is awaited no more."""
        posting = self._reading
        if posting is None or posting.number != number:
            return None
        self._reading = None
        return posting

    # -- the way to the end -----------------------------------------------------------------

    def _advance(self) -> Actions:
        """The next step, if all it needs is there."""
        if self._over or self.state is HandoffState.VERIFIED or self.grant is None:
            return []
        if self._reservation is None:
            if self._asking:
                return []
            self._asking = True
            self._asked += 1
            return [Reserve(self._asked)]
        if self._reading is not None or not self._linked:
            return []
        if self._done < self.spec.num_blocks:
            ready = min(self._ready_blocks(), self._done + self.spec.max_read_blocks)
            return self._post(self._done, ready) if ready > self._done else []
        return self._verified() if self.first_tokens else []

    def _ready_blocks(self) -> int:
        if self._ready_tokens >= self.spec.num_tokens:
            return self.spec.num_blocks
        return self._ready_tokens // self.spec.block_size

    def _post(self, first: int, end: int) -> Actions:
        fence = self.hit_blocks if end == self.spec.num_blocks else None
        self._reads += 1
        self._reading = self._open[self._reads] = _Posting(self._reads, end)
        self.state = HandoffState.READ
        actions: Actions = [] if self._reading_told else [SendReading()]
        self._reading_told = True
        return [*actions, PostRead(self._reads, first, end, fence)]

    def _verified(self) -> Actions:
        self.state = HandoffState.VERIFIED
        self._claimed = False
        return [SendRelease(), Join()]

    def taken(self) -> bool:
        """The engine takes the reservation: from now on it is not this handoff's to give back."""
        if self.state is not HandoffState.VERIFIED:
            return False
        self.state = HandoffState.RUN
        self._reservation = None
        return True

    def joined(self, error: Exception | None = None) -> Actions:
        """The engine has taken the sequences, or could not."""
        return [Finish(error)]

    def _finish(self, error: Exception) -> Actions:
        if self._over:
            return []
        actions: Actions = []
        if self._claimed:
            actions.append(SendRelease())
        self.state = HandoffState.OVER
        self._asking = self._connecting = False
        self._reading = None
        number, self._reservation = self._reservation, None
        if number is not None:
            for posting in self._open.values():
                posting.given_back = True
            actions.append(GiveBack(number, tuple(self._open)))
        return [*actions, Finish(error)]
