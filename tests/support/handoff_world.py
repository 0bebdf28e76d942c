"""The simulated world of tests/property/test_handoff_machine.py: a P, a link, a driver of D."""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from contracts.errors import HandoffError, OutOfBlocks, TransferFailed
from contracts.handoff import (
    Claim,
    ClaimDenied,
    Reading,
    Release,
    Revoked,
)
from contracts.ids import Incarnation, RequestId, TransferId
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from decode_worker import machine as m
from decode_worker.quarantine import Quarantine
from engine.block_pool import BlockPool
from engine.generations import GenerationWords
from engine.scheduler import Scheduler
from engine.sequence import Reservation, blocks_for
from kv_transfer.leases import Ended, ExportTable

BLOCK = 4
LEASE_S = 2.0
BEAT_S = 0.5
SILENCE_S = 3.0
STUCK_S = 10.0
ROOM = 16  # blocks on either side
Content = tuple[object, ...]


class World(Protocol):
    """What a driver needs of everything around it."""

    now: float
    prompts: dict[str, tuple[int, ...]]
    scheduler: Scheduler
    quarantine: Quarantine
    content: list[Content]  # of D's blocks
    reads: list["Read"]

    def kv(self, name: str, index: int) -> Content:
        """What block `index` of a prompt contains."""

    def ended(self, read: "Read", *, failed: bool) -> None:
        """A read is over."""


class Prefill:
    """One P: its pool, its exports, what its blocks contain. A restart is another one."""

    def __init__(self, incarnation: int, world: World) -> None:
        self.incarnation = Incarnation(incarnation)
        self.world = world
        self.words = GenerationWords(ROOM, incarnation)
        self.pool = BlockPool(ROOM, self.words)
        self.exports = ExportTable(LEASE_S, lambda: world.now)
        self.content: list[Content] = [("nothing",)] * ROOM
        self.alive = True

    def finish(self, ended: Ended | None, *, tell: bool = True) -> None:
        if ended is None:
            return
        self.pool.unlease(ended.block_ids)
        if tell and ended.reason != "released" and isinstance(ended.claimer, Link):
            ended.claimer.down.append(Revoked(ended.transfer_id, ended.reason))

    def receive(self, link: "Link", message: object) -> None:
        match message:
            case Claim():
                link.down.append(self._claim(link, message))
            case Reading():
                self.exports.reading(message.transfer_id, link)
            case Release():
                if self.exports.is_claimer(message.transfer_id, link, message.nonce):
                    self.finish(self.exports.release(message.transfer_id))

    def _claim(self, link: "Link", claim: Claim) -> object:
        try:
            return self.exports.claim(
                claim.transfer_id,
                claim.nonce,
                claim.prompt_digest,
                link,
                lambda blocks: self.words.read(tuple(blocks)),
            )
        except HandoffError as error:
            if self.exports.ended(claim.transfer_id) == "ended":
                return Revoked(claim.transfer_id, "ended")
            return ClaimDenied(claim.transfer_id, type(error).__name__, str(error))

    def scribble(self, count: int) -> None:
        """Another owner takes blocks, writes them and leaves."""
        try:
            blocks = self.pool.allocate(count)
        except OutOfBlocks:
            return
        for block in blocks:
            self.content[block] = ("another's",)
        self.pool.release(blocks)


@dataclass(eq=False)
class Link:
    """One stream: messages wait in order; when it is lost, they are gone."""

    p: Prefill
    up: deque[object] = field(default_factory=deque[object])
    down: deque[object] = field(default_factory=deque[object])
    open: bool = True
    acknowledged_at: float = 0.0


@dataclass(eq=False)
class Read:
    """A posted read: `left` has not landed yet."""

    handoff: "Driver"
    number: int
    p: Prefill
    left: list[tuple[int, int]]  # P's block, D's block
    fence: list[tuple[int, int]]  # whose words are read when all has landed
    verifying: bool = False  # that has begun
    landed_words: dict[int, int] = field(default_factory=dict[int, int])
    told: bool = False  # its result


class Driver:
    """What decode_worker.handoff does, on the simulated world."""

    def __init__(self, world: World, name: str, p: Prefill, blocks: tuple[int, ...]) -> None:
        self.world = world
        self.name = name
        self.p = p
        self.p_blocks = blocks
        prompt = world.prompts[name]
        self.request = GenerationRequest(
            RequestId(name), prompt, SamplingParams(max_tokens=4, temperature=0.0)
        )
        self.machine = m.HandoffMachine(
            m.HandoffSpec(
                transfer_id=TransferId(name),
                incarnation=p.incarnation,
                num_tokens=len(prompt),
                num_blocks=blocks_for(len(prompt), BLOCK),
                block_size=BLOCK,
                max_read_blocks=2,
                connect_s=SILENCE_S,
                silence_s=SILENCE_S,
                stuck_s=STUCK_S,
            )
        )
        self.link: Link | None = None
        self.alive_at = world.now
        self.reservation: Reservation | None = None
        self.reserved_number = 0
        self.wants: int | None = None  # number of an unanswered Reserve
        self.reclaimed: list[int] = []  # not told yet
        self.connecting = False
        self.joining = False
        self.finished = 0
        self.error: Exception | None = None
        self.joined = False
        self.do(self.machine.start(world.now))

    @property
    def heard_at(self) -> float:
        if self.link is not None:
            self.alive_at = max(self.alive_at, self.link.acknowledged_at)
        return self.alive_at

    @property
    def lease_until(self) -> float:
        return self.heard_at + LEASE_S - BEAT_S

    def do(self, actions: m.Actions) -> None:
        for action in actions:
            match action:
                case m.Connect():
                    self.connecting = True
                case m.SendClaim():
                    self.send(Claim(TransferId(self.name), f"nonce-{self.name}", "digest"))
                case m.SendReading():
                    self.send(Reading(TransferId(self.name)))
                case m.SendRelease():
                    self.send(Release(TransferId(self.name), f"nonce-{self.name}"))
                case m.Reserve():
                    self.wants = action.number
                case m.PostRead():
                    self.post(action)
                case m.GiveBack():
                    reservation, self.reservation = self.reservation, None
                    assert reservation is not None
                    held = self.world.quarantine.begin([(self, n) for n in action.posted])
                    self.world.scheduler.unreserve(reservation, held)
                case m.EndQuarantine():
                    self.world.quarantine.end((self, action.number))
                case m.Join():
                    self.joining = True
                case m.Finish():
                    self.finished += 1
                    self.error = action.error

    def send(self, message: object) -> None:
        if self.link is not None and self.link.open:
            self.link.up.append(message)

    def post(self, action: m.PostRead) -> None:
        assert self.reservation is not None
        assert self.machine.grant is not None
        if not self.reservation.pin():
            self.do(self.machine.reclaimed(self.reserved_number))
            return
        ours, theirs = self.reservation.blocks, self.machine.grant.block_ids
        first, end = action.first, action.end
        pairs = list(zip(theirs[first:end], ours[first:end], strict=True))
        fence: list[tuple[int, int]] = []
        if action.fence is not None:
            first = action.fence
            fence = list(zip(theirs[first:end], ours[first:end], strict=True))
        self.world.quarantine.posted((self, action.number), ours[first:end])
        read = Read(self, action.number, self.p, pairs, fence)
        self.world.reads.append(read)
        if self.world.now >= self.lease_until:  # the connector is not given it (L1)
            read.left = []
            self.world.ended(read, failed=True)

    def join(self) -> None:
        assert self.reservation is not None
        self.joining = False
        reservation = self.reservation
        if not reservation.pin():
            self.do(self.machine.fail(TransferFailed("its memory was taken back")))
            return
        if not self.machine.taken():
            return
        self.reservation = None
        for index, block in enumerate(reservation.blocks[: self.machine.spec.num_blocks]):
            expected = self.world.kv(self.name, index)
            assert self.world.content[block] == expected, "D decodes from something else"
        self.world.scheduler.adopt(reservation, self.machine.first_tokens)
        self.joined = True
        self.do(self.machine.joined())
