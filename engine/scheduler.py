"""Decides what the next step computes, and moves sequences when it is done. No torch in here."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, repeat

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
from engine.chunks import chunk_of
from engine.guide import Guide
from engine.handoffs import Handoffs
from engine.load import load_of
from engine.outcomes import prompt_scores, token_out
from engine.plan import Chunk, Sampled, StepPlan, StepResult
from engine.roster import Roster
from engine.sequence import Progress, Reservation, Sequence, Started, blocks_for
from engine.streams import advance, decodes_of, stream_of

EngineEvent = Started | Progress | TokensOut | PromptScores | RequestFailed

_PATIENCE_STEPS = 32  # then the head of the queue goes before arriving handoffs (M7)
_SCORED_TOKENS = 256  # of a step: each needs a whole row of logits


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
    `move` computes a plan that only moves blocks to and from host memory; it is there if the pool
    has some.
    """

    move: Callable[[StepPlan], object]

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
        return load_of(self._step, self._roster, self.pool)

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
        reservation = self._handoffs.reserve(request, [] if keys is None else keys, on_reclaimed)
        self._move()
        return reservation

    def _move(self) -> None:
        """Make the moves that are due at once: what a handoff writes does not wait for a step."""
        host = self.pool.host
        offloads, loads = host.take() if host is not None else ((), ())
        if host is not None and (offloads or loads):
            self.move(StepPlan(self._step, (), offloads=offloads, loads=loads))
            host.loaded(loads)

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
        streams, filling = self._grow_decodes(chunks, budget)
        if streams or chunks:
            budget.tokens = min(budget.tokens, self.config.prefill_tokens_beside_decodes)
        for seq in filling:
            count = budget.take(seq)
            if count:
                chunks.append(chunk_of(seq, count))
        self._admit_waiting(chunks, budget, alone=not streams)
        copies, decodes = roster.take_copies(), decodes_of(streams)
        moves = self.pool.host.take() if self.pool.host is not None else ((), ())
        return StepPlan(self._step, tuple(chunks), copies, decodes, *moves)

    def _grow_decodes(
        self, chunks: list[Chunk], budget: _Budget
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Give each running sequence with one token left room for it, within the budget.

        Adds the chunks of those that are not streams. Returns those that are, and the running
        sequences with more tokens left, both in their order. Whoever loses its blocks to one that
        grows comes behind it in this order.
        """
        roster, size = self._roster, self.config.block_size
        members = roster.running.copy()
        if len(members) > budget.tokens:
            members = self._within(budget.tokens)
        filling: list[Sequence] = []
        # Only at the border of a block a sequence may lack one.
        for seq in [s for s in members if s.stream is None or not s.num_computed % size]:
            if seq.stream is not None:
                roster.grow(seq)
            elif seq.remaining == 1:
                if roster.grow(seq):
                    chunks.append(chunk_of(seq, 1))
            elif seq.remaining > 1 and seq.block_ids:
                filling.append(seq)
        streams = [s for s in members if s.stream is not None]
        budget.tokens -= len(chunks) + len(streams)
        return streams, filling

    def _within(self, tokens: int) -> list[Sequence]:
        """The running ones without those whose one token is too much, which need no room yet."""
        kept: list[Sequence] = []
        for seq in self._roster.running.copy():
            if seq.remaining == 1:
                if not tokens or not self._roster.grow(seq):
                    continue
                tokens -= 1
            kept.append(seq)
        return kept

    def _admit_waiting(self, chunks: list[Chunk], budget: _Budget, *, alone: bool) -> None:
        """Start sequences in their order; whoever does not fit holds up those behind it.

        `alone`: nothing but `chunks` is in the step so far.
        """
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
                if alone and not chunks and idle:  # beams that wait for one that is not running
                    roster.preempt(idle[-1])
                    continue
                self._blocked = not no_place
                no_room = True
                break
            chunks.append(chunk_of(seq, budget.take(seq)))
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
        if plan.loads and self.pool.host is not None:
            self.pool.host.loaded(plan.loads)
        if result.tokens is not None:
            self._events += advance(plan.decodes, result.tokens, repeat(()), self._roster)
        else:
            drawn = list(islice(draws, len(plan.decodes)))
            for index in [i for i, draw in enumerate(drawn) if draw.ended or draw.error]:
                self._advance_chunk(plan.decodes.chunk(index), [drawn[index]], ())  # its last one
            tokens = [draw.token_id for draw in drawn]
            told = [() if draw.logprob is None else (draw.logprob,) for draw in drawn]
            self._events += advance(plan.decodes, tokens, told, self._roster)
        for chunk in plan.others:
            entries = next(scores) if chunk.scored is not None else ()
            self._advance_chunk(chunk, [next(draws) for _ in chunk.slots], entries)

    def _advance_chunk(
        self, chunk: Chunk, drawn: list[Sampled], entries: tuple[PromptLogprob, ...]
    ) -> None:
        seq = self._roster.by_key.get(chunk.sequence)
        if seq is None:
            return  # its request has failed in this step
        before = seq.num_computed
        seq.num_computed += len(chunk.token_ids)
        self.computed_prompt_tokens += max(0, min(seq.num_computed, seq.num_prompt) - before)
        self._roster.remember(seq)
        if seq.export:
            request = seq.request
            self._events.append(Progress(request.request_id, request.attempt, seq.num_computed))
        if chunk.scored is not None:
            self._events += prompt_scores(seq.request, chunk.start + 1, entries)
            seq.scored = chunk.start + len(entries) + 1 < seq.num_prompt
        if drawn:
            self._apply_draws(seq, drawn)

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
                    seq.block_ids,
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
            self._events.append(token_out(seq, choice, draw, finish))
            if finish is None:
                going_on.append((choice, draw.token_id))
        if seq.export or not going_on:
            self._roster.end(seq)
            return
        for choice, token in going_on[1:]:
            self._roster.fork(seq, choice, token)
        seq.choices = (going_on[0][0],)
        seq.token_ids.append(going_on[0][1])
        seq.stream = stream_of(seq)
        seq.max_length = seq.num_prompt + self._max_outputs(request)

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
                self._events.append(token_out(seq, 0, draw, None))
        else:
            group.advance(candidates, self._roster)
        if group.search.over:
            self._events += told(request, group.search)

    def _finish(self, seq: Sequence, draw: Sampled) -> FinishReason | None:
        if draw.ended or draw.token_id in seq.ends:
            return FinishReason.STOP
        if seq.num_outputs + 1 >= self._max_outputs(seq.request):
            return FinishReason.LENGTH
        return None

    def _max_outputs(self, request: GenerationRequest) -> int:
        room = self.config.max_model_len - len(request.prompt_ids)
        return min(request.params.max_tokens, room)
