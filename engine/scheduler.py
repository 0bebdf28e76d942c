"""Decides what the next step computes, and moves sequences when it is done. No torch in here."""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from contracts.errors import InvalidRequest, OutOfBlocks, Overloaded
from contracts.events import FinishReason, TokensOut, WorkerLoad
from contracts.ids import RequestId
from contracts.request import GenerationRequest
from engine.block_pool import BlockPool
from engine.plan import Chunk, Sampled, SampleSlot, StepPlan
from engine.sequence import Progress, Reservation, Sequence, Started, blocks_for, extend_keys

EngineEvent = Started | Progress | TokensOut

_PATIENCE_STEPS = 32  # then the head of the queue goes before arriving handoffs (M7)


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


class Scheduler:
    """Waiting and running sequences of one engine, in order of arrival.

    `schedule` makes a plan, `commit` applies its outcome; between the two nothing else is called.
    A waiting sequence holds no block. A running one holds all blocks of its known tokens (M1).
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._by_key: dict[int, Sequence] = {}
        self._copies: list[tuple[int, int]] = []  # (source, target); the source is pinned
        self._events: list[EngineEvent] = []
        self._next_key = 0
        self._next_arrival = 0
        self._step = 0
        self.preemptions = 0
        self.computed_prompt_tokens = 0  # prompt tokens this engine ran through the model
        self.cached_prompt_tokens = 0
        self._blocked = False
        self._head_waits = 0  # steps in which the head of the queue found no room
        self._arriving = 0  # sequences of open reservations

    # -- requests ---------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step could compute something."""
        return bool(self._waiting or self._running)

    @property
    def blocked(self) -> bool:
        """Whether the head of the queue waits for blocks."""
        return self._blocked and bool(self._waiting)

    def load(self) -> WorkerLoad:
        """Queue and memory, for routers."""
        pending = [s for s in self._running if s.remaining > 1]
        return WorkerLoad(
            step=self._step,
            waiting=len(self._waiting),
            running=len(self._running),
            waiting_tokens=sum(s.remaining for s in self._waiting)
            + sum(s.remaining for s in pending),
            free_blocks=self.pool.available,
            total_blocks=self.pool.total,
        )

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

    def add(self, request: GenerationRequest, *, export: bool) -> None:
        """Queue a request. Raises InvalidRequest or Overloaded; then nothing has changed."""
        self.check_fits(request)
        if len(self._waiting) >= self.config.max_waiting:
            raise Overloaded(f"{len(self._waiting)} sequences are waiting")
        arrival = self._arrive()
        alive = tuple(i for i in range(request.params.n) if i not in request.finished)
        outputs = [request.output_ids[i] if request.output_ids else () for i in alive]
        if export and any(outputs):
            raise InvalidRequest("a prefill for a handoff cannot bring output tokens")
        # A fresh request is one sequence until its first draw, a replayed one a sequence a choice.
        parts = (
            [(alive, ())] if not any(outputs) else [((c,), outputs[i]) for i, c in enumerate(alive)]
        )
        for choices, output in parts:
            seq = self._new(request, choices, [*request.prompt_ids, *output], arrival)
            seq.export = export
            insort(self._waiting, seq, key=lambda s: s.order)

    def abort(self, request_id: RequestId, attempt: int) -> bool:
        """Drop a request's sequences and blocks. Idempotent; True if there was one."""
        found = False
        for seq in [*self._waiting, *self._running]:
            if seq.request.request_id == request_id and seq.request.attempt == attempt:
                self._end(seq)
                found = True
        return found

    def _arrive(self) -> int:
        self._next_arrival += 1
        return self._next_arrival

    def _new(
        self,
        request: GenerationRequest,
        choices: tuple[int, ...],
        token_ids: list[int],
        arrival: int,
    ) -> Sequence:
        self._next_key += 1
        seq = Sequence(self._next_key, request, choices, token_ids, arrival)
        self._by_key[seq.key] = seq
        return seq

    # -- handoffs arriving at a D -----------------------------------------------------------

    def reserve(self, request: GenerationRequest, keys: list[bytes] | None = None) -> Reservation:
        """Reserve all that an arriving handoff needs (M2), outside the growth headroom (M3).

        `keys`: whoever tries again passes the same list, so that the prompt is hashed once.

        Raises:
            OutOfBlocks: nothing was reserved: no blocks, no place among the running, or the head
                of the queue has waited long enough.
        """
        size = self.config.block_size
        length = len(request.prompt_ids)
        full = len(self._running) + self._arriving >= self.config.max_running
        if full or (self._waiting and self._head_waits > _PATIENCE_STEPS):
            raise OutOfBlocks(blocks_for(length + 1, size), 0)
        keys = [] if keys is None else keys
        extend_keys(keys, list(request.prompt_ids), size, request.cache_salt, length // size)
        hits = self.pool.lookup(keys) if self.config.prefix_caching else []
        self.pool.pin_reserved(hits)
        spare_count = request.params.n - 1
        fresh_count = blocks_for(length + 1, size) - len(hits)
        try:
            wanted = fresh_count + spare_count
            if wanted > self.pool.available - self._headroom():
                raise OutOfBlocks(wanted, self.pool.available - self._headroom())
            fresh = self.pool.reserve(fresh_count)
        except OutOfBlocks:
            self.pool.unreserve(hits)
            raise
        spare = self.pool.reserve(spare_count) if spare_count else []
        self._arriving += request.params.n
        return Reservation(request, hits + fresh, len(hits), spare, keys)

    def unreserve(self, reservation: Reservation, in_flight: Iterable[int] = ()) -> None:
        """Give a reservation up; blocks in `in_flight` may still be written and are quarantined."""
        self._arriving -= reservation.request.params.n
        posted = set(in_flight)
        every = reservation.blocks + reservation.spare
        self.pool.quarantine([b for b in every if b in posted])
        self.pool.unreserve([b for b in every if b not in posted])

    def adopt(self, reservation: Reservation, first: Iterable[TokensOut]) -> None:
        """Start decoding from verified blocks and token 1 of each choice that goes on."""
        request = reservation.request
        self._arriving -= request.params.n
        length = len(request.prompt_ids)
        full = length // self.config.block_size
        arrival = self._arrive()
        self.pool.adopt(reservation.blocks)
        self.pool.adopt(reservation.spare)
        if self.config.prefix_caching:
            for block, key in zip(reservation.blocks, reservation.block_keys, strict=False):
                self.pool.remember(block, key)
        spare = list(reservation.spare)
        own: list[int] | None = list(reservation.blocks)
        for tokens in first:
            if tokens.finish is not None:
                continue
            seq = self._new(
                request, (tokens.choice,), [*request.prompt_ids, *tokens.token_ids], arrival
            )
            seq.started = True
            seq.num_computed = length
            seq.block_keys = list(reservation.block_keys)
            seq.num_remembered = full
            if own is not None:
                seq.block_ids, own = own, None
            else:
                shared = reservation.blocks[:full]
                self.pool.share(shared)
                target = spare.pop()
                seq.block_ids = [*shared, target]
                if length % self.config.block_size:
                    self._copy(reservation.blocks[full], target)
            insort(self._running, seq, key=lambda s: s.order)
        if own is not None:
            self.pool.release(own)
        self.pool.release(spare)

    # -- a step -----------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step: decodes first, then prefill chunks within the budget."""
        self._step += 1
        chunks: list[Chunk] = []
        budget = self.config.max_step_tokens
        for seq in [s for s in self._running if s.remaining == 1]:
            if budget == 0 or not self._grow(seq):
                continue
            chunks.append(self._chunk(seq, 1))
            budget -= 1
        if chunks:
            budget = min(budget, self.config.prefill_tokens_beside_decodes)
        for seq in [s for s in self._running if s.remaining > 1]:
            if budget == 0:
                break
            count = min(seq.remaining, budget)
            chunks.append(self._chunk(seq, count))
            budget -= count
        self._admit_waiting(chunks, budget)
        copies, self._copies = tuple(self._copies), []
        return StepPlan(self._step, tuple(chunks), copies)

    def _admit_waiting(self, chunks: list[Chunk], budget: int) -> None:
        """Start sequences in order of arrival; whoever does not fit holds up those behind it."""
        head = self._waiting[0] if self._waiting else None
        self._blocked = False
        while self._waiting and budget and len(self._running) < self.config.max_running:
            seq = self._waiting[0]
            if not self._admit(seq):
                self._blocked = True
                break
            count = min(seq.remaining, budget)
            chunks.append(self._chunk(seq, count))
            budget -= count
        no_room = self._blocked or len(self._running) >= self.config.max_running
        waits = no_room and head is not None and head in self._waiting[:1]
        self._head_waits = self._head_waits + 1 if waits else 0

    def take_events(self) -> list[EngineEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def commit(self, plan: StepPlan, sampled: Iterable[Sampled]) -> None:
        """Advance the sequences of `plan`; `sampled` has one token for each slot, in order."""
        draws = iter(sampled)
        self.pool.release([source for source, _ in plan.copies])
        for chunk in plan.chunks:
            seq = self._by_key[chunk.sequence]
            before = seq.num_computed
            seq.num_computed += len(chunk.token_ids)
            self.computed_prompt_tokens += max(0, min(seq.num_computed, seq.num_prompt) - before)
            self._remember(seq)
            if seq.export:
                request = seq.request
                self._events.append(Progress(request.request_id, request.attempt, seq.num_computed))
            if chunk.slots:
                self._apply_draws(seq, [next(draws) for _ in chunk.slots])

    def _chunk(self, seq: Sequence, count: int) -> Chunk:
        start = seq.num_computed
        slots: tuple[SampleSlot, ...] = ()
        if start + count == len(seq.token_ids):
            slots = tuple(
                SampleSlot(choice, seq.num_outputs, seq.request.params) for choice in seq.choices
            )
        token_ids = tuple(seq.token_ids[start : start + count])
        return Chunk(seq.key, start, token_ids, tuple(seq.block_ids), slots)

    def _headroom(self) -> int:
        """Blocks kept for the growth of running decodes: one each (M3)."""
        return sum(1 for s in self._running if not s.export)

    def _admit(self, seq: Sequence) -> bool:
        size = self.config.block_size
        length = len(seq.token_ids)
        hits: list[int] = []
        if self.config.prefix_caching:
            # The last token is always computed: its logits are not in the cache (F3).
            extend_keys(
                seq.block_keys, seq.token_ids, size, seq.request.cache_salt, (length - 1) // size
            )
            hits = self.pool.lookup(seq.block_keys[: (length - 1) // size])
        self.pool.share(hits)
        need = blocks_for(length, size) - len(hits)
        if need > self.pool.available - self._headroom():
            self.pool.release(hits)
            return False
        seq.block_ids = hits + self.pool.allocate(need, hits[-1] if hits else None)
        seq.num_computed = len(hits) * size
        seq.num_remembered = len(hits)
        self._waiting.pop(0)
        insort(self._running, seq, key=lambda s: s.order)
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

    def _grow(self, seq: Sequence) -> bool:
        """Give `seq` the block its next token needs, preempting later arrivals if it must."""
        if seq.key not in self._by_key or not seq.block_ids:
            return False  # preempted earlier in this step
        while len(seq.block_ids) < blocks_for(len(seq.token_ids), self.config.block_size):
            try:
                seq.block_ids += self.pool.allocate(1, seq.block_ids[-1])
            except OutOfBlocks:
                victim = max(
                    (s for s in self._running if not s.export), key=lambda s: s.order, default=seq
                )
                self._preempt(victim)
                if victim is seq:
                    return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.preemptions += 1
        self._running.remove(seq)
        self._free(seq)
        seq.num_computed = seq.num_remembered = 0
        insort(self._waiting, seq, key=lambda s: s.order)

    def _free(self, seq: Sequence) -> None:
        held = set(seq.block_ids)
        dropped = [copy for copy in self._copies if copy[1] in held]
        if dropped:  # a copy into a block that is given back must never run
            self._copies = [copy for copy in self._copies if copy[1] not in held]
            self.pool.release([source for source, _ in dropped])
        self.pool.release(seq.block_ids)
        seq.block_ids = []

    def _end(self, seq: Sequence) -> None:
        if seq in self._running:
            self._running.remove(seq)
        else:
            self._waiting.remove(seq)
        self._free(seq)
        del self._by_key[seq.key]

    def _copy(self, source: int, target: int) -> None:
        self.pool.share([source])
        self._copies.append((source, target))

    def _remember(self, seq: Sequence) -> None:
        if not self.config.prefix_caching:
            return
        size = self.config.block_size
        full = seq.num_computed // size
        if full <= seq.num_remembered:
            return
        extend_keys(seq.block_keys, seq.token_ids, size, seq.request.cache_salt, full)
        for index in range(seq.num_remembered, full):
            self.pool.remember(seq.block_ids[index], seq.block_keys[index])
        seq.num_remembered = full

    def _apply_draws(self, seq: Sequence, draws: list[Sampled]) -> None:
        request = seq.request
        going_on: list[tuple[int, int]] = []  # (choice, token)
        for choice, draw in zip(seq.choices, draws, strict=True):
            finish = self._finish(seq, draw.token_id)
            self._events.append(
                TokensOut(
                    request.request_id,
                    request.attempt,
                    choice,
                    seq.num_outputs,
                    (draw.token_id,),
                    (draw.logprob,) if draw.logprob is not None else (),
                    finish,
                )
            )
            if finish is None:
                going_on.append((choice, draw.token_id))
        if seq.export or not going_on:
            self._end(seq)
            return
        for choice, token in going_on[1:]:
            self._fork(seq, choice, token)
        seq.choices = (going_on[0][0],)
        seq.token_ids.append(going_on[0][1])

    def _finish(self, seq: Sequence, token_id: int) -> FinishReason | None:
        params = seq.request.params
        if params.ends(token_id):
            return FinishReason.STOP
        count = seq.num_outputs + 1
        if count >= params.max_tokens or len(seq.token_ids) + 1 >= self.config.max_model_len:
            return FinishReason.LENGTH
        return None

    def _fork(self, parent: Sequence, choice: int, token: int) -> None:
        """A further choice: full blocks shared, the partly filled last one copied."""
        size = self.config.block_size
        token_ids = [*parent.token_ids, token]
        full = parent.num_computed // size
        partial = parent.num_computed % size
        child = self._new(parent.request, (choice,), token_ids, parent.arrival)
        child.started = True
        child.block_keys = parent.block_keys[:full]
        if partial and self.pool.available == 0:  # no block for the copy: recompute later
            insort(self._waiting, child, key=lambda s: s.order)
            return
        shared = parent.block_ids[:full]
        self.pool.share(shared)
        child.block_ids = list(shared)
        if partial:
            target = self.pool.allocate(1)[0]
            child.block_ids.append(target)
            self._copy(parent.block_ids[full], target)
        child.num_computed = parent.num_computed
        child.num_remembered = full
        insort(self._running, child, key=lambda s: s.order)
