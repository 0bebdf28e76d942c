"""Decides what the next step computes, and moves sequences when it is done. No torch in here."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from contracts.errors import EngineFailure, InvalidRequest, OutOfBlocks, Overloaded
from contracts.events import (
    FinishReason,
    PromptLogprob,
    PromptScores,
    RequestFailed,
    TokensOut,
    WorkerLoad,
)
from contracts.ids import RequestId
from contracts.request import GenerationRequest
from engine.audit import Finding, Known, audit
from engine.beam_group import BeamGroup, told
from engine.beams import BeamSearch
from engine.block_pool import BlockPool
from engine.guide import Guide
from engine.handoffs import Handoffs
from engine.plan import Chunk, Sampled, SampleSlot, StepPlan, StepResult
from engine.roster import Roster
from engine.sequence import Progress, Reservation, Sequence, Started, blocks_for

EngineEvent = Started | Progress | TokensOut | PromptScores | RequestFailed

_PATIENCE_STEPS = 32  # then the head of the queue goes before arriving handoffs (M7)
_SCORED_TOKENS = 256  # of a step: each needs a whole row of logits
_PIECE_BYTES = 64 << 10  # of prompt scores in one event, so that tokens are not held up


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds of a step and of the queue."""

    block_size: int
    max_model_len: int
    max_step_tokens: int = 2048
    max_running: int = 256
    max_waiting: int = 1024
    prefill_tokens_beside_decodes: int = 512  # protects the ITL of running decodes
    prefix_caching: bool = True


@dataclass(slots=True)
class _Budget:
    """What is left of a step."""

    tokens: int
    scored: int = _SCORED_TOKENS

    def take(self, seq: Sequence) -> int:
        """Tokens of `seq` that this step computes, 0 if none; they are spent."""
        count = min(seq.remaining, self.tokens, self.scored if seq.scored else self.tokens)
        self.tokens -= count
        self.scored -= count if seq.scored else 0
        return count


class Scheduler:
    """Waiting and running sequences of one engine, in order of priority, then arrival.

    `schedule` makes a plan, `commit` applies its outcome; between the two nothing else is called.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        caching = config.prefix_caching
        self._roster = Roster(pool, config.block_size, prefix_caching=caching)
        self._handoffs = Handoffs(self._roster, config.block_size, prefix_caching=caching)
        self._events: list[EngineEvent] = []
        self._step = 0
        self.computed_prompt_tokens = 0  # prompt tokens this engine ran through the model
        self.cached_prompt_tokens = 0
        self._blocked = False
        self._head_waits = 0  # steps in which the head of the queue found no room

    # -- requests ---------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step could compute something."""
        return bool(self._roster.waiting or self._roster.running)

    @property
    def blocked(self) -> bool:
        """Whether the head of the queue waits for blocks."""
        return self._blocked and bool(self._roster.waiting)

    @property
    def step(self) -> int:
        """How many steps were planned."""
        return self._step

    @property
    def preemptions(self) -> int:
        """How often a running sequence lost its blocks."""
        return self._roster.preemptions

    def load(self) -> WorkerLoad:
        """Queue and memory, for routers."""
        waiting, running = self._roster.waiting, self._roster.running
        ledger = self.pool.ledger()
        return WorkerLoad(
            step=self._step,
            waiting=len(waiting),
            running=len(running),
            waiting_tokens=sum(s.remaining for s in waiting)
            + sum(s.remaining for s in running if s.remaining > 1),
            free_blocks=self.pool.available,
            total_blocks=ledger.total,
            free=ledger.free,
            cached=ledger.cached,
            owned=ledger.owned,
            leased=ledger.leased,
            reserved=ledger.reserved,
            quarantined=ledger.quarantined,
        )

    def audit(self, known: Known) -> set[Finding]:
        """Recount all blocks and ask for whom each is held; between two steps only."""
        roster = self._roster
        sequences = list(roster.by_key.values())
        return audit(self.pool, sequences, roster.copy_sources(), self._handoffs.open, known)

    def check_fits(self, request: GenerationRequest) -> None:
        """Raise InvalidRequest if this engine can never hold the request."""
        length = len(request.prompt_ids) + max(map(len, request.output_ids), default=0)
        if not request.prompt_ids:
            raise InvalidRequest("the prompt has no tokens", param="messages")
        if length >= self.config.max_model_len:
            raise InvalidRequest(
                f"the prompt has {length} tokens; the context is {self.config.max_model_len} "
                "and one must be left for the answer",
                param="input_tokens",
            )
        need = blocks_for(length + 1, self.config.block_size) + request.params.n - 1
        if need > self.pool.total:
            raise InvalidRequest(
                f"the request needs {need} KV blocks, this worker has {self.pool.total}",
                param="input_tokens",
            )

    def add(self, request: GenerationRequest, *, export: bool, guide: Guide | None = None) -> None:
        """Queue a request. Raises InvalidRequest or Overloaded; then nothing has changed."""
        self.check_fits(request)
        if len(self._roster.waiting) >= self.config.max_waiting:
            raise Overloaded(f"{len(self._roster.waiting)} sequences are waiting")
        params = request.params
        alive = tuple(i for i in range(params.n) if i not in request.finished)
        outputs = [request.output_ids[i] if request.output_ids else () for i in alive]
        if export and any(outputs):
            raise InvalidRequest("a prefill for a handoff cannot bring output tokens")
        # A fresh request is one sequence until its first draw, a replayed one a sequence a choice.
        if params.beam:
            parts: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((0,), ())]
        elif any(outputs):
            parts = [((choice,), outputs[i]) for i, choice in enumerate(alive)]
        else:
            parts = [(alive, ())]
        arrival = self._roster.arrive()
        for number, (choices, output) in enumerate(parts):
            token_ids = [*request.prompt_ids, *output]
            seq = self._roster.create(request, choices, token_ids, arrival, guide)
            seq.export = export
            to_score = params.prompt_logprobs is not None and len(request.prompt_ids) > 1
            seq.scored = to_score and number == 0
            self._roster.queue(seq)

    def abort(self, request_id: RequestId, attempt: int) -> bool:
        """Drop a request's sequences and blocks. Idempotent; True if there was one."""
        found = [
            seq
            for seq in self._roster.by_key.values()
            if seq.request.request_id == request_id and seq.request.attempt == attempt
        ]
        for seq in found:
            self._roster.end(seq)
        return bool(found)

    # -- handoffs arriving at a D -----------------------------------------------------------

    def reserve(
        self,
        request: GenerationRequest,
        keys: list[bytes] | None = None,
        on_reclaimed: Callable[[], None] | None = None,
    ) -> Reservation:
        """Reserve all that an arriving handoff needs (M2), outside the growth headroom (M3).

        `keys`: whoever tries again passes the same list, so that the prompt is hashed once.
        `on_reclaimed`: see Handoffs.reserve.

        Raises:
            OutOfBlocks: nothing was reserved: no blocks, no place among the running, or the head
                of the queue has waited long enough.
        """
        waiting, running = self._roster.waiting, self._roster.running
        full = len(running) + self._handoffs.arriving >= self.config.max_running
        starving = (
            self._head_waits > _PATIENCE_STEPS
            and bool(waiting)
            and waiting[0].request.priority <= request.priority
        )
        if full or starving:
            raise OutOfBlocks(blocks_for(len(request.prompt_ids) + 1, self.config.block_size), 0)
        return self._handoffs.reserve(request, [] if keys is None else keys, on_reclaimed)

    def unreserve(self, reservation: Reservation, in_flight: Iterable[int] = ()) -> None:
        """Give a reservation up; blocks in `in_flight` may still be written and are quarantined."""
        self._handoffs.unreserve(reservation, in_flight)

    def adopt(
        self,
        reservation: Reservation,
        first: Iterable[TokensOut] = (),
        guide: Guide | None = None,
    ) -> None:
        """Start decoding from verified blocks and token 1 of each choice that goes on.

        With `redraw`, `first` is not looked at: token 1 is drawn here.
        """
        most = self._max_outputs(reservation.request)
        self._events += self._handoffs.adopt(reservation, first, guide, most)

    # -- a step -----------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step: decodes first, then prefill chunks within the budget."""
        self._step += 1
        roster = self._roster
        chunks: list[Chunk] = []
        budget = _Budget(self.config.max_step_tokens)
        for seq in [s for s in roster.running if s.remaining == 1]:
            if not budget.tokens or not roster.grow(seq):
                continue
            budget.tokens -= 1
            chunks.append(self._chunk(seq, 1))
        if chunks:
            budget.tokens = min(budget.tokens, self.config.prefill_tokens_beside_decodes)
        for seq in [s for s in roster.running if s.remaining > 1]:
            count = budget.take(seq)
            if count:
                chunks.append(self._chunk(seq, count))
        self._admit_waiting(chunks, budget)
        return StepPlan(self._step, tuple(chunks), roster.take_copies())

    def _admit_waiting(self, chunks: list[Chunk], budget: _Budget) -> None:
        """Start sequences in their order; whoever does not fit holds up those behind it."""
        roster = self._roster
        head = roster.waiting[0] if roster.waiting else None
        self._blocked = no_room = False
        while roster.waiting and budget.tokens:
            seq = roster.waiting[0]
            if seq.scored and not budget.scored:
                break
            no_place = len(roster.running) >= self.config.max_running
            if no_place or not self._admit(seq):
                idle = [s for s in roster.running if not s.remaining]
                if not chunks and idle:  # beams that wait for one that is not running
                    roster.preempt(idle[-1])
                    continue
                self._blocked = not no_place
                no_room = True
                break
            chunks.append(self._chunk(seq, budget.take(seq)))
        waits = no_room and head is not None and head in roster.waiting[:1]
        self._head_waits = self._head_waits + 1 if waits else 0

    def take_over(self) -> list[int]:
        """Sequences that are over since the last call, by key."""
        return self._roster.take_over_keys()

    def take_events(self) -> list[EngineEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Advance the sequences of `plan` by what its computation gave."""
        draws, scores = iter(result.sampled), iter(result.scores)
        self._roster.copied(plan.copies)
        for chunk in plan.chunks:
            entries = next(scores) if chunk.scored is not None else ()
            drawn = [next(draws) for _ in chunk.slots]
            seq = self._roster.by_key.get(chunk.sequence)
            if seq is None:
                continue  # its request has failed in this step
            before = seq.num_computed
            seq.num_computed += len(chunk.token_ids)
            self.computed_prompt_tokens += max(0, min(seq.num_computed, seq.num_prompt) - before)
            self._roster.remember(seq)
            if seq.export:
                request = seq.request
                self._events.append(Progress(request.request_id, request.attempt, seq.num_computed))
            if chunk.scored is not None:
                self._events += _pieces(seq.request, chunk.start + 1, entries)
                seq.scored = chunk.start + len(entries) + 1 < seq.num_prompt
            if drawn:
                self._apply_draws(seq, drawn)

    def _chunk(self, seq: Sequence, count: int) -> Chunk:
        start = seq.num_computed
        end = start + count
        slots = self._slots(seq) if end == len(seq.token_ids) else ()
        token_ids, table = tuple(seq.token_ids[start:end]), tuple(seq.block_ids)
        scored_ids = seq.request.prompt_ids[start + 1 : end + 1] if seq.scored else ()
        if not scored_ids:
            return Chunk(seq.key, start, token_ids, table, slots)
        scored = seq.request.params.prompt_logprobs
        return Chunk(seq.key, start, token_ids, table, slots, scored, scored_ids)

    def _slots(self, seq: Sequence) -> tuple[SampleSlot, ...]:
        request = seq.request
        before: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        if seq.looks_back:
            before = (request.prompt_ids, tuple(seq.token_ids[seq.num_prompt :]))
        position = seq.num_outputs
        return tuple(
            [
                SampleSlot(choice, position, request.params, seq.key, *before, seq.guide)
                for choice in seq.choices
            ]
        )

    def _admit(self, seq: Sequence) -> bool:
        if not self._roster.admit(seq):
            return False
        if not seq.started:
            seq.started = True
            if seq.export:
                self.pool.lease(seq.block_ids)
            self.cached_prompt_tokens += seq.num_computed
            self._events.append(
                Started(
                    seq.request.request_id,
                    seq.request.attempt,
                    tuple(seq.block_ids),
                    seq.num_computed,
                    seq.export,
                )
            )
        return True

    def _apply_draws(self, seq: Sequence, draws: list[Sampled]) -> None:
        request = seq.request
        for draw in draws:
            if draw.error:
                self._fail(request, draw.error)
                return
        if request.params.beam:
            self._apply_candidates(seq, draws[0])
            return
        going_on: list[tuple[int, int]] = []  # (choice, token)
        for choice, draw in zip(seq.choices, draws, strict=True):
            finish = self._finish(seq, draw)
            self._events.append(_token(seq, choice, draw, finish))
            if finish is None:
                going_on.append((choice, draw.token_id))
        if seq.export or not going_on:
            self._roster.end(seq)
            return
        for choice, token in going_on[1:]:
            self._roster.fork(seq, choice, token)
        seq.choices = (going_on[0][0],)
        seq.token_ids.append(going_on[0][1])

    def _fail(self, request: GenerationRequest, error: str) -> None:
        """End all of a request: one of its draws cannot be made."""
        self.abort(request.request_id, request.attempt)
        kind = EngineFailure.__name__
        self._events.append(RequestFailed(request.request_id, request.attempt, kind, error))

    def _apply_candidates(self, seq: Sequence, draw: Sampled) -> None:
        """A beam has its candidates; once all of its group have, they go on together."""
        request = seq.request
        assert draw.logprob is not None, "a beam's draw brings its candidates"
        seq.candidates = draw.logprob
        if seq.group is None:
            most = self._max_outputs(request)
            seq.group = BeamGroup(BeamSearch(request.params, seq.num_prompt, most), [seq])
        group = seq.group
        candidates = group.candidates
        if candidates is None:
            return
        if seq.export:  # D goes on, from the same candidates
            group.search.advance(candidates)
            self._roster.end(seq)
            if not group.search.over:
                self._events.append(_token(seq, 0, draw, None))
        else:
            group.advance(candidates, self._roster)
        if group.search.over:
            self._events += told(request, group.search)

    def _finish(self, seq: Sequence, draw: Sampled) -> FinishReason | None:
        if draw.ended or seq.request.params.ends(draw.token_id):
            return FinishReason.STOP
        if seq.num_outputs + 1 >= self._max_outputs(seq.request):
            return FinishReason.LENGTH
        return None

    def _max_outputs(self, request: GenerationRequest) -> int:
        room = self.config.max_model_len - len(request.prompt_ids)
        return min(request.params.max_tokens, room)


def _token(seq: Sequence, choice: int, draw: Sampled, finish: FinishReason | None) -> TokensOut:
    return TokensOut(
        seq.request.request_id,
        seq.request.attempt,
        choice,
        seq.num_outputs,
        (draw.token_id,),
        (draw.logprob,) if draw.logprob is not None else (),
        finish,
    )


def _pieces(
    request: GenerationRequest, position: int, entries: tuple[PromptLogprob, ...]
) -> Iterator[PromptScores]:
    """Scores of prompt tokens, a few at a time."""
    most = max(1, _PIECE_BYTES // (12 + 8 * max(len(entry.top) for entry in entries)))
    for first in range(0, len(entries), most):
        yield PromptScores(
            request.request_id,
            request.attempt,
            position + first,
            entries[first : first + most],
        )
