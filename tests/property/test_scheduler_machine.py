"""Random requests, aborts, handoffs and tight memory: every token right, every block accounted."""

from collections import Counter
from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from contracts.errors import OutOfBlocks
from contracts.events import PromptLogprob, PromptScores, TokensOut
from contracts.ids import RequestId
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from engine.audit import Known
from engine.block_pool import BlockPool
from engine.generations import GenerationWords
from engine.host_pool import HostPool
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import Reservation, Started
from tests.support.naive_beams import naive_beams
from tests.support.paged_oracle import (
    PagedOracle,
    candidates,
    continuation,
    next_token,
    prompt_score,
)

BLOCK = 4
MAX_LEN = 40
BEAM_END = 3  # of the 12 tokens that beams are made of


@dataclass
class Expected:
    request: GenerationRequest
    export: bool
    outputs: dict[int, list[int]] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    leased: tuple[int, ...] = ()
    scores: dict[int, PromptLogprob] = field(default_factory=dict)

    def beams(self) -> list[list[int]]:
        prompt, params = self.request.prompt_ids, self.request.params
        most = min(params.max_tokens, MAX_LEN - len(prompt))
        found = naive_beams(
            lambda tokens, count: candidates(tokens, count // 2).top,
            prompt,
            params.n,
            most,
            params.eos_token_ids,
            params.length_penalty,
        )
        return [tokens for tokens, _ in found]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.sampled_from([10, 13, 24]),  # the longest sequence alone takes 10
        budget=st.integers(3, 40),
        running=st.integers(1, 8),
        caching=st.booleans(),
        as_tokens=st.booleans(),
        offload=st.sampled_from([0, 2, 9, 40]),  # blocks of host memory
    )
    def start(
        self, blocks: int, budget: int, running: int, caching: bool, as_tokens: bool, offload: int
    ) -> None:
        self.words = GenerationWords(blocks, incarnation=7)
        self.pool = BlockPool(blocks, self.words, HostPool(offload, 1) if offload else None)
        config = SchedulerConfig(
            block_size=BLOCK,
            max_model_len=MAX_LEN,
            max_step_tokens=budget,
            max_running=running,
            prefill_tokens_beside_decodes=max(1, budget // 2),
            prefix_caching=caching,
        )
        self.scheduler = Scheduler(config, self.pool)
        self.oracle = PagedOracle(blocks, BLOCK, as_tokens=as_tokens)
        self.scheduler.move = self.oracle.compute
        self.requests: dict[RequestId, Expected] = {}
        self.reservations: list[Reservation] = []
        self.quarantined: list[list[int]] = []
        self.count = 0

    def _request(
        self, prompt: list[int], new: int, n: int, kind: str = "plain", priority: int = 0
    ) -> GenerationRequest:
        self.count += 1
        if kind == "beam":
            params = SamplingParams(
                max_tokens=new, n=n, beam=True, eos_token_ids=(BEAM_END,), length_penalty=0.7
            )
        else:
            params = SamplingParams(
                max_tokens=new,
                n=n,
                prompt_logprobs=0 if kind == "scored" else None,
                frequency_penalty=0.5 if kind == "looking back" else 0.0,
            )
        name = RequestId(f"r{self.count}")
        return GenerationRequest(name, tuple(prompt), params, priority=priority)

    # Few distinct tokens and lengths around block borders, so that prefixes repeat.
    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=18)

    kinds = st.sampled_from(["plain", "looking back", "scored", "beam", "beam"])

    @rule(
        prompt=prompts,
        new=st.integers(1, 9) | st.just(30),
        n=st.integers(1, 3),
        export=st.booleans(),
        kind=kinds,
        priority=st.integers(-1, 1),
    )
    def add(
        self, prompt: list[int], new: int, n: int, export: bool, kind: str, priority: int
    ) -> None:
        request = self._request(prompt, new, n, kind, priority)
        self.scheduler.add(request, export=export)
        self.requests[request.request_id] = Expected(request, export)

    @rule(prompt=prompts, new=st.integers(2, 9), n=st.integers(1, 3), done=st.integers(0, 4))
    def replay(self, prompt: list[int], new: int, n: int, done: int) -> None:
        request = self._request(prompt, new, n)
        done = min(done, new - 1)
        outputs = tuple(tuple(continuation(prompt, done, choice)) for choice in range(n))
        request = GenerationRequest(
            request.request_id, request.prompt_ids, request.params, output_ids=outputs
        )
        self.scheduler.add(request, export=False)
        expected = Expected(request, False)
        expected.outputs = {choice: list(outputs[choice]) for choice in range(n)}
        self.requests[request.request_id] = expected

    @rule(
        prompt=prompts,
        new=st.integers(2, 9),
        n=st.integers(1, 3),
        kind=kinds,
        redraw=st.booleans(),
    )
    def reserve(self, prompt: list[int], new: int, n: int, kind: str, redraw: bool) -> None:
        kind = "plain" if kind == "scored" else kind  # never asked of a D
        request = replace(self._request(prompt, new, n, kind), redraw=redraw)
        before = self.pool.ledger()
        try:
            reservation = self.scheduler.reserve(request)
        except OutOfBlocks:
            assert self.pool.ledger() == before
            return
        assert len(set(reservation.blocks + reservation.spare)) == len(
            reservation.blocks + reservation.spare
        )
        self.reservations.append(reservation)

    @precondition(lambda self: bool(self.reservations))
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.reservations) - 1))
        reservation = self.reservations.pop(index)
        request = reservation.request
        prompt, params = request.prompt_ids, request.params
        for block in range(reservation.num_hits, len(reservation.blocks)):
            for offset in range(BLOCK):
                position = block * BLOCK + offset
                if position < len(prompt) - request.redraw:  # the last one is to be computed
                    slot = self.oracle.slots[reservation.blocks[block]]
                    slot[offset] = (position, prompt[position])
        first = []
        expected = Expected(request, False)
        if params.beam and not request.redraw:
            found = candidates(prompt, params.n)
            first.append(TokensOut(request.request_id, 0, 0, 0, (found.top[0][0],), (found,)))
        for choice in range(0 if params.beam or request.redraw else params.n):
            token = next_token(prompt, choice)
            first.append(TokensOut(request.request_id, 0, choice, 0, (token,)))
            expected.outputs[choice] = [token]
        self.requests[request.request_id] = expected
        self.scheduler.adopt(reservation, first)
        self._collect()

    @precondition(lambda self: bool(self.reservations))
    @rule(posted=st.integers(0, 3))
    def give_up_reservation(self, posted: int) -> None:
        reservation = self.reservations.pop()
        in_flight = reservation.blocks[reservation.num_hits :][:posted]
        self.scheduler.unreserve(reservation, in_flight)
        self.quarantined.append(in_flight)

    @precondition(lambda self: bool(self.quarantined))
    @rule()
    def transfer_ends(self) -> None:
        blocks = self.quarantined.pop()
        for block in blocks:  # late bytes land: nobody may care
            self.oracle.slots[block] = [(-1, -1)] * BLOCK
        self.pool.unquarantine(blocks)

    @precondition(lambda self: bool(self.requests))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        expected = self.requests[request_id]
        self.scheduler.abort(request_id, 0)
        self._collect()
        self._unlease(expected)
        del self.requests[request_id]

    @precondition(lambda self: any(e.leased for e in self.requests.values()))
    @rule(data=st.data())
    def release_lease(self, data: st.DataObject) -> None:
        held = sorted(r for r, e in self.requests.items() if e.leased and len(e.outputs))
        if held:
            self._unlease(self.requests[data.draw(st.sampled_from(held))])

    def _unlease(self, expected: Expected) -> None:
        if expected.leased:
            self.pool.unlease(expected.leased)
            expected.leased = ()

    @rule(steps=st.integers(1, 4))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            frozen = {
                block: list(self.oracle.slots[block])
                for e in self.requests.values()
                if e.leased and e.outputs
                for block in e.leased
            }
            plan = self.scheduler.schedule()
            assert plan.num_tokens <= self.scheduler.config.max_step_tokens
            self.scheduler.commit(plan, self.oracle.compute(plan))
            self._collect()
            for block, content in frozen.items():  # F3: an exported block is written by nobody
                assert self.oracle.slots[block] == content

    def _collect(self) -> None:
        for event in self.scheduler.take_events():
            expected = self.requests.get(event.request_id)
            assert expected is not None
            if isinstance(event, Started):
                assert event.cached_tokens < len(expected.request.prompt_ids) + 9
                if event.export:
                    expected.leased = event.block_ids
            elif isinstance(event, PromptScores):
                assert expected.request.params.prompt_logprobs is not None
                expected.scores.update(enumerate(event.entries, event.position))
            elif isinstance(event, TokensOut) and expected.request.params.beam:
                self._beam(expected, event)
            elif isinstance(event, TokensOut):
                outputs = expected.outputs.setdefault(event.choice, [])
                assert event.position == len(outputs)
                outputs += event.token_ids
                prompt = expected.request.prompt_ids
                assert outputs == continuation(prompt, len(outputs), event.choice)
                limit = 1 if expected.export else expected.request.params.max_tokens
                assert (event.finish is not None) == (
                    len(outputs) == expected.request.params.max_tokens
                    or len(prompt) + len(outputs) >= MAX_LEN
                )
                assert len(outputs) <= limit
                if event.finish is not None:
                    expected.finished.add(event.choice)

    def _beam(self, expected: Expected, event: TokensOut) -> None:
        request = expected.request
        assert event.position == 0
        expected.outputs[event.choice] = list(event.token_ids)
        if event.finish is None:  # what a P tells D
            assert expected.export
            assert event.choice == 0
            found = candidates(request.prompt_ids, request.params.n)
            assert event.logprobs == (found,)
        else:
            assert list(event.token_ids) == expected.beams()[event.choice]
            expected.finished.add(event.choice)

    @invariant()
    def ledger_holds(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            assert self.scheduler.audit(self._known()) == set()
            load = self.scheduler.load()
            slots = self.pool.host.total if self.pool.host is not None else 0
            assert load.offload_free + load.offload_cached == slots, "nothing is loading now"

    @invariant()
    def counts_are_those_of_a_recount(self) -> None:
        if hasattr(self, "pool"):
            roster = self.scheduler._roster
            unread = [s.remaining for s in roster.running if s.remaining > 1]
            waiting = sum(unread) + sum(s.remaining for s in roster.waiting)
            assert self.scheduler.load().waiting_tokens == waiting
            assert roster.headroom() == sum(not s.export for s in roster.running)
            assert roster.running == sorted(roster.running, key=lambda s: s.order)
            assert all(s.remaining == 1 for s in roster.running if s.stream is not None)
            assert all(s.stream is None for s in roster.waiting)

    def _known(self) -> Known:
        return Known(
            frozenset((request_id, 0) for request_id in self.requests),
            leased=Counter(block for e in self.requests.values() for block in e.leased),
            quarantined=Counter(block for blocks in self.quarantined for block in blocks),
            reservations=frozenset(self.reservations),
        )

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for reservation in self.reservations:
            self.scheduler.unreserve(reservation)
        for blocks in self.quarantined:
            self.pool.unquarantine(blocks)
        for _ in range(2000):
            for expected in self.requests.values():
                if expected.outputs:
                    self._unlease(expected)
            if not self.scheduler.has_work:
                break
            plan = self.scheduler.schedule()
            self.scheduler.commit(plan, self.oracle.compute(plan))
            self._collect()
        assert not self.scheduler.has_work, "the scheduler is stuck"
        for expected in self.requests.values():
            self._unlease(expected)
            prompt = expected.request.prompt_ids
            if expected.request.params.prompt_logprobs is not None:
                assert expected.scores == {
                    index: prompt_score(prompt[: index + 1]) for index in range(1, len(prompt))
                }
            if not expected.export:
                assert expected.finished == set(range(expected.request.params.n))
        assert self.pool.ledger().idle, self.pool.ledger()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
