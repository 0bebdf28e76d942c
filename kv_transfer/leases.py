"""P's side of handoffs: which blocks are promised to whom, and until when. Pure; no I/O.

    create ──> PREFILL ──complete──> READY ──release, revoke, expiry──> ended (a tombstone)
                  └───────────release, revoke, expiry─────────────────────^

| state   | unclaimed                              | claimed                                 |
| ------- | -------------------------------------- | --------------------------------------- |
| PREFILL | no deadline (the prefill has its own)  | a lease after the claim or last renewal |
| READY   | a lease after the end of prefill       | a lease after the claim or last renewal |

A lease is over when `expired` says so, not before: until then a late beat or claim still saves
it, which costs nothing, for its blocks are still there (the fence is what makes reads safe, L1).
Every way out gives the transfer's block ids to the caller exactly once, as an `Ended`; the
caller then frees them, and stops the prefill if it is still running.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from contracts.errors import ClaimRefused, TransferFailed, TransferGone
from contracts.events import TokensOut
from contracts.handoff import ClaimGranted
from contracts.ids import BlockId, TransferId

_OUR_FAULT = frozenset({"pressure", "failed", "aborted", "closing"})  # reasons of P, not of D

Generations = Callable[[Sequence[BlockId]], Sequence[int]]


class ExportState(Enum):
    """How far the prefill of an exported prompt is."""

    PREFILL = "prefill"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Ended:
    """A transfer that has just ended: `block_ids` are the caller's to free, told only once."""

    transfer_id: TransferId
    block_ids: tuple[BlockId, ...]
    reason: str  # released, expired, or what was given to `revoke`
    in_prefill: bool  # the prefill still runs: stop it first
    claimer: Hashable | None  # the link to tell (`Revoked`), if there is one


@dataclass(frozen=True, slots=True)
class Export:
    """What the table knows of a live transfer."""

    transfer_id: TransferId
    state: ExportState
    block_ids: tuple[BlockId, ...]
    num_tokens: int
    ready_tokens: int
    claimed: bool
    claimer: Hashable | None


class ExportTable:
    """All live transfers of one P. One thread (the event loop) owns it.

    Args:
        lease_s: of claimed transfers, and of unclaimed ones unless `create` says otherwise.
        clock: monotonic seconds (L1).
        tombstone_leases: ended ids are known as ended for that many leases.
    """

    def __init__(
        self, lease_s: float, clock: Callable[[], float], tombstone_leases: int = 10
    ) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._tombstone_s = lease_s * tombstone_leases
        self._live: dict[TransferId, _Record] = {}  # oldest first
        self._tombstones: dict[TransferId, tuple[str, float]] = {}  # reason, end; oldest first

    def create(
        self,
        transfer_id: TransferId,
        block_ids: Sequence[BlockId],
        num_tokens: int,
        prompt_digest: str,
        unclaimed_lease_s: float | None = None,
    ) -> None:
        """Export a prompt whose prefill begins; `block_ids` hold all its `num_tokens`.

        `unclaimed_lease_s`: how long it waits for a claim after the prefill (L2).

        Raises:
            ValueError: the id was used before.
        """
        if transfer_id in self._live or transfer_id in self._tombstones:
            raise ValueError("a transfer id is used once")
        self._live[transfer_id] = _Record(
            transfer_id=transfer_id,
            block_ids=tuple(block_ids),
            num_tokens=num_tokens,
            prompt_digest=prompt_digest,
            unclaimed_lease_s=self._lease_s if unclaimed_lease_s is None else unclaimed_lease_s,
        )

    def ready(self, transfer_id: TransferId, tokens: int) -> Hashable | None:
        """The first `tokens` tokens are complete on the device (F2); never takes any back.

        Returns the link to tell (`ChunkReady`), None if there is none or nothing is new.
        """
        record = self._live.get(transfer_id)
        if record is None or tokens <= record.ready_tokens:
            return None
        record.ready_tokens = min(tokens, record.num_tokens)
        return record.claimer

    def complete(
        self, transfer_id: TransferId, first_tokens: Sequence[TokensOut] = ()
    ) -> Hashable | None:
        """The prefill has ended: all tokens are ready, token 1 of every choice is drawn.

        Returns the link to tell (`FirstTokens`), if there is one.
        """
        record = self._live.get(transfer_id)
        if record is None:
            return None
        if record.state is ExportState.PREFILL:
            record.state = ExportState.READY
            record.ready_tokens = record.num_tokens
            record.first_tokens = tuple(first_tokens)
            if record.nonce is None:
                record.deadline = self._clock() + record.unclaimed_lease_s
        return record.claimer

    def claim(
        self,
        transfer_id: TransferId,
        nonce: str,
        prompt_digest: str,
        claimer: Hashable,
        generations_of: Generations,
    ) -> ClaimGranted:
        """Grant a claim over the link `claimer`, which from now on renews it (C1, C2, L3).

        The same nonce again gets the same blocks and generations, over whichever link it
        comes, with the readiness of now.

        Raises:
            TransferGone: the transfer is over or was never here.
            TransferFailed: it is over because this P gave it up.
            ClaimRefused: it is claimed with another nonce, or the digest differs. Nothing
                has changed.
        """
        record = self._live.get(transfer_id)
        if record is None:
            reason = self._tombstones.get(transfer_id, ("unknown", 0.0))[0]
            kind = TransferFailed if reason in _OUR_FAULT else TransferGone
            raise kind(f"transfer {transfer_id}: {reason}")
        if prompt_digest != record.prompt_digest:
            raise ClaimRefused(
                f"prompt digest of transfer {transfer_id}: here {record.prompt_digest}, "
                f"claimed {prompt_digest}"
            )
        if record.nonce is not None and record.nonce != nonce:
            raise ClaimRefused(f"transfer {transfer_id} is claimed by another D")
        if record.nonce is None:
            record.generations = tuple(generations_of(record.block_ids))
            record.nonce = nonce
        record.claimer = claimer
        record.deadline = self._clock() + self._lease_s
        return ClaimGranted(
            transfer_id=transfer_id,
            block_ids=record.block_ids,
            generations=record.generations,
            num_tokens=record.num_tokens,
            ready_tokens=record.ready_tokens,
            lease_ms=round(self._lease_s * 1000),
            first_tokens=record.first_tokens,
        )

    def renew(self, claimer: Hashable) -> int:
        """A beat came over the link `claimer`: renew all its claims (L2); their number."""
        deadline = self._clock() + self._lease_s
        renewed = 0
        for record in self._live.values():
            if record.nonce is not None and record.claimer == claimer:
                record.deadline = deadline
                renewed += 1
        return renewed

    def lost_claimer(self, claimer: Hashable) -> None:
        """The link is lost: nothing renews its claims until they are claimed anew (L3)."""
        for record in self._live.values():
            if record.claimer == claimer:
                record.claimer = None

    def release(self, transfer_id: TransferId) -> Ended | None:
        """D has read all, or wants none of it. None if it was over already: acknowledge both."""
        return self._end(transfer_id, "released")

    def revoke(self, transfer_id: TransferId, reason: str) -> Ended | None:
        """P takes it back (L5). None if it was over already."""
        return self._end(transfer_id, reason)

    def expired(self, now: float | None = None) -> list[Ended]:
        """End all transfers whose lease is over at `now` (None: the clock's)."""
        now = self._clock() if now is None else now
        over = [
            record.transfer_id
            for record in self._live.values()
            if record.deadline is not None and now >= record.deadline
        ]
        ends = [self._end(transfer_id, "expired") for transfer_id in over]
        return [end for end in ends if end is not None]

    def reading(self, transfer_id: TransferId, claimer: Hashable) -> None:
        """Its claimer has begun to read (L6)."""
        record = self._live.get(transfer_id)
        if record is not None and record.claimer == claimer:
            record.reading = True

    def revocable(self) -> list[TransferId]:
        """Complete transfers that nobody reads, in the order in which to revoke them (L6).

        Those that nobody has claimed first, then those whose D waits for memory; oldest first.
        """
        idle = [
            record
            for record in self._live.values()
            if record.state is ExportState.READY and not record.reading
        ]
        idle.sort(key=lambda record: record.nonce is not None)
        return [record.transfer_id for record in idle]

    def is_claimer(self, transfer_id: TransferId, claimer: Hashable, nonce: str) -> bool:
        """Whether a message over `claimer` with that nonce is from whoever claimed it (C2)."""
        record = self._live.get(transfer_id)
        if record is None or record.nonce is None:
            return False
        return record.claimer == claimer or record.nonce == nonce

    def get(self, transfer_id: TransferId) -> Export | None:
        """A live transfer."""
        record = self._live.get(transfer_id)
        return None if record is None else record.export()

    def ended(self, transfer_id: TransferId) -> str | None:
        """Why a transfer ended, while its tombstone stands."""
        self._bury()
        tombstone = self._tombstones.get(transfer_id)
        return None if tombstone is None else tombstone[0]

    def __iter__(self) -> Iterator[Export]:
        return iter([record.export() for record in self._live.values()])

    def __len__(self) -> int:
        return len(self._live)

    def _end(self, transfer_id: TransferId, reason: str) -> Ended | None:
        self._bury()
        record = self._live.pop(transfer_id, None)
        if record is None:
            return None
        self._tombstones[transfer_id] = (reason, self._clock())
        return Ended(
            transfer_id=transfer_id,
            block_ids=record.block_ids,
            reason=reason,
            in_prefill=record.state is ExportState.PREFILL,
            claimer=record.claimer,
        )

    def _bury(self) -> None:
        """Drop tombstones that have stood long enough."""
        until = self._clock() - self._tombstone_s
        while self._tombstones:
            oldest = next(iter(self._tombstones))
            if self._tombstones[oldest][1] > until:
                return
            del self._tombstones[oldest]


@dataclass(slots=True)
class _Record:
    """A live transfer. Claimed: `nonce` is set and `generations` are those granted.

    `claimer` is the link that renews it: None before a claim and after the link's loss.
    `deadline` None: no lease runs (unclaimed in PREFILL).
    """

    transfer_id: TransferId
    block_ids: tuple[BlockId, ...]
    num_tokens: int
    prompt_digest: str
    unclaimed_lease_s: float
    state: ExportState = ExportState.PREFILL
    ready_tokens: int = 0
    first_tokens: tuple[TokensOut, ...] = ()
    nonce: str | None = None
    generations: tuple[int, ...] = ()
    claimer: Hashable | None = None
    reading: bool = False
    deadline: float | None = None

    def export(self) -> Export:
        return Export(
            transfer_id=self.transfer_id,
            state=self.state,
            block_ids=self.block_ids,
            num_tokens=self.num_tokens,
            ready_tokens=self.ready_tokens,
            claimed=self.nonce is not None,
            claimer=self.claimer,
        )
