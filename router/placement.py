"""Choosing a path and a pair: pure functions of a snapshot.

Least loaded wins, ties go to the lower worker id. A worker's load is what it reported plus what
this router has sent since and the report cannot know of yet.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from contracts.errors import InvalidRequest, Overloaded, Unavailable
from contracts.events import WorkerLoad
from contracts.ids import Incarnation, WorkerId
from contracts.worker import Role
from router.two_step import Step

_NO_LOAD = WorkerLoad()
_NO_INCARNATION = Incarnation(0)

Instance = tuple[WorkerId, Incarnation]
"""One start of a worker: what is true of it says nothing of the next one under the same id."""


class NoCapacity(Unavailable):
    """No connected worker can take the request now."""


class DecodesFull(Overloaded):
    """A P could compute the prompt, but no D has room for what it would hand over."""


class Path(StrEnum):
    """Where the prompt is computed."""

    REMOTE = "remote"  # on a P, then handed over to a D
    PREFILL_ONLY = "prefill_only"  # on a P, and one token is the whole answer
    LOCAL = "local"  # on the D that also decodes
    EXPORTED = "exported"  # on a P, for whoever comes with the params (two-step)
    ADOPTED = "adopted"  # earlier, on a P that some client's request named (two-step)


class Reason(StrEnum):
    """Why that path."""

    DISAGGREGATED = "disaggregated"
    ONE_TOKEN = "one_token"
    AGGREGATED = "aggregated"
    NO_PREFILL_WORKER = "no_prefill_worker"
    PROMPT_EXCEEDS_PREFILL = "prompt_exceeds_prefill"
    HANDOFF_REFUSED = "handoff_refused"
    REPLAY = "replay"
    TWO_STEP = "two_step"


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """A connected worker as this router sees it. `unreported*` is missing from `load`.

    `promised_blocks` are those that this router's handoffs will need on a D that has them coming;
    `refuses`: it has lately said that it has no room.
    """

    worker_id: WorkerId
    role: Role
    semantic_hash: str
    max_prompt_tokens: int
    load: WorkerLoad = _NO_LOAD
    unreported: int = 0  # requests
    unreported_tokens: int = 0  # their prompt tokens
    incarnation: Incarnation = _NO_INCARNATION
    max_model_len: int = 0
    block_size: int = 1
    total_blocks: int | None = None  # None: not known
    promised_blocks: int = 0
    refuses: bool = False

    @property
    def instance(self) -> Instance:
        """Which start of which worker."""
        return self.worker_id, self.incarnation

    @property
    def requests(self) -> int:
        """Requests on the worker, running or not."""
        return self.load.running + self.load.waiting + self.unreported

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens it has yet to compute."""
        return self.load.waiting_tokens + self.unreported_tokens

    def has_room(self, need: "Need") -> bool:
        """Whether this D would promise a handoff its blocks, as far as one router can know."""
        if self.refuses:
            return False
        if self.total_blocks is None or not self.promised_blocks:
            return True
        return self.promised_blocks + need.blocks(self.block_size) <= self.total_blocks


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks of its workers.

    `emitted_tokens` were computed by an earlier attempt (a replay); `semantic_hash` is then that
    attempt's. `force_local` after no D would take a handoff. Those in `exclude` have failed it.
    """

    prompt_tokens: int
    max_tokens: int
    emitted_tokens: int = 0
    semantic_hash: str | None = None
    force_local: bool = False
    exclude: frozenset[Instance] = frozenset()
    step: Step | None = None  # of the two-step form
    num_choices: int = 1

    def blocks(self, block_size: int) -> int:
        """What a handoff of the prompt takes on a D: itself, and one block a choice (M2)."""
        return -(-(self.prompt_tokens + 1) // block_size) + self.num_choices - 1


@dataclass(frozen=True, slots=True)
class Decision:
    """A path, its workers and why. `prefill` or `decode` is None where the path has none."""

    path: Path
    reason: Reason
    prefill: WorkerId | None
    decode: WorkerId | None
    semantic_hash: str


def choose(workers: Iterable[WorkerSnapshot], need: Need, *, aggregated: bool = False) -> Decision:
    """Choose path and workers.

    Raises:
        InvalidRequest: the prompt is longer than any connected worker can hold.
        NoCapacity: nobody can take it now.
        DecodesFull: a P would compute what no D has room for.
    """
    known = [w for w in workers if need.semantic_hash in (None, w.semantic_hash)]
    able = [w for w in known if not w.load.draining and w.instance not in need.exclude]
    decodes = _fitting(able, Role.DECODE, need)
    if need.step is Step.EXPORT:
        return _export(able, need)
    if need.step is Step.ADOPT and decodes and not need.force_local and not need.emitted_tokens:
        d = min(decodes, key=_decode_cost)
        return Decision(Path.ADOPTED, Reason.TWO_STEP, None, d.worker_id, d.semantic_hash)
    prefills = [] if aggregated or need.emitted_tokens else _fitting(able, Role.PREFILL, need)
    if need.max_tokens == 1 and prefills and not need.force_local:
        p = min(prefills, key=_prefill_cost)
        return Decision(Path.PREFILL_ONLY, Reason.ONE_TOKEN, p.worker_id, None, p.semantic_hash)
    if not decodes:
        raise _nobody(known, need, aggregated)
    hashes = {d.semantic_hash for d in decodes}
    paired = [p for p in prefills if p.semantic_hash in hashes]
    if paired and not need.force_local:
        roomy = [d for d in decodes if d.has_room(need)]
        hashes = {d.semantic_hash for d in roomy}
        paired = [p for p in paired if p.semantic_hash in hashes]
        if not paired:
            raise DecodesFull("every decode worker is full")
        p = min(paired, key=_prefill_cost)
        d = min((d for d in roomy if d.semantic_hash == p.semantic_hash), key=_decode_cost)
        return Decision(
            Path.REMOTE, Reason.DISAGGREGATED, p.worker_id, d.worker_id, p.semantic_hash
        )
    d = min(decodes, key=_decode_cost)
    reason = _why_local(able, need, aggregated)
    return Decision(Path.LOCAL, reason, None, d.worker_id, d.semantic_hash)


def _export(able: list[WorkerSnapshot], need: Need) -> Decision:
    prefills = _fitting(able, Role.PREFILL, need)
    if not prefills:
        raise NoCapacity("no prefill worker can take the request now")
    p = min(prefills, key=_prefill_cost)
    return Decision(Path.EXPORTED, Reason.TWO_STEP, p.worker_id, None, p.semantic_hash)


def choose_decode(workers: Iterable[WorkerSnapshot], need: Need) -> WorkerId:
    """Another D for a handoff that a D refused (`need.exclude`); of the same semantic hash.

    Raises:
        NoCapacity: there is none.
    """
    able = [
        w
        for w in workers
        if w.semantic_hash == need.semantic_hash
        and not w.load.draining
        and w.instance not in need.exclude
    ]
    decodes = _fitting(able, Role.DECODE, need)
    if not decodes:
        raise NoCapacity("no other decode worker can take the handoff")
    return min(decodes, key=_decode_cost).worker_id


def _fitting(workers: list[WorkerSnapshot], role: Role, need: Need) -> list[WorkerSnapshot]:
    return [w for w in workers if w.role is role and _fits(w, need)]


def _fits(worker: WorkerSnapshot, need: Need) -> bool:
    if need.emitted_tokens:  # it has run before, and may go on to the context's very end
        longest = max(worker.max_prompt_tokens, worker.max_model_len - 1)
        return need.prompt_tokens + need.emitted_tokens <= longest
    if need.prompt_tokens > worker.max_prompt_tokens:
        return False
    return worker.total_blocks is None or need.blocks(worker.block_size) <= worker.total_blocks


def _prefill_cost(worker: WorkerSnapshot) -> tuple[int, int, WorkerId]:
    return worker.queued_tokens, worker.requests, worker.worker_id


def _decode_cost(worker: WorkerSnapshot) -> tuple[int, int, int, WorkerId]:
    return worker.requests, worker.queued_tokens, -worker.load.free_blocks, worker.worker_id


def _why_local(able: list[WorkerSnapshot], need: Need, aggregated: bool) -> Reason:
    if need.emitted_tokens:
        return Reason.REPLAY
    if aggregated:
        return Reason.AGGREGATED
    if need.force_local:
        return Reason.HANDOFF_REFUSED
    if any(w.role is Role.PREFILL and not _fits(w, need) for w in able):
        return Reason.PROMPT_EXCEEDS_PREFILL
    return Reason.NO_PREFILL_WORKER


def _nobody(known: list[WorkerSnapshot], need: Need, aggregated: bool) -> Exception:
    """The error when no D is left: never possible, or just not now."""
    decodes = [w for w in known if w.role is Role.DECODE]
    if decodes and not need.emitted_tokens and not any(_fits(d, need) for d in decodes):
        most = max(d.max_prompt_tokens for d in decodes)
        text = f"the prompt has {need.prompt_tokens} tokens; no worker can hold more than {most}"
        if need.prompt_tokens <= most:
            text = f"no worker has room for a prompt of that length and {need.num_choices} choices"
        return InvalidRequest(text, "input_tokens")
    if not decodes:
        return NoCapacity("no decode worker is connected")
    return NoCapacity("no decode worker can take the request now")
