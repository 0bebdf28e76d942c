"""The ledger: counted with every change, verified after every step, audited on demand."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from queue import Queue

import pytest

from contracts.errors import OutOfBlocks
from contracts.ids import RequestId
from contracts.request import GenerationRequest
from contracts.sampling import SamplingParams
from engine.audit import Known, lines
from engine.block_pool import BlockPool, Ledger, LedgerFault, block_key
from engine.generations import GenerationWords
from engine.loop import Engine
from engine.plan import StepPlan, StepResult
from engine.scheduler import EngineEvent, Scheduler, SchedulerConfig
from tests.support.paged_oracle import PagedOracle

BLOCK, BLOCKS = 4, 16
WAIT_S = 20.0


def pool_of(blocks: int = BLOCKS) -> BlockPool:
    return BlockPool(blocks, GenerationWords(blocks, incarnation=1))


def scheduler_of() -> Scheduler:
    return Scheduler(SchedulerConfig(block_size=BLOCK, max_model_len=60), pool_of())


def request_of(name: str, length: int = 10) -> GenerationRequest:
    prompt = tuple(sum(name.encode()) + i for i in range(length))
    return GenerationRequest(RequestId(name), prompt, SamplingParams(max_tokens=40))


def counts(ledger: Ledger) -> tuple[int, ...]:
    return tuple(getattr(ledger, state) for state in Ledger.STATES)


def test_every_state_by_precedence() -> None:
    pool = pool_of(4)
    assert counts(pool.ledger()) == (4, 0, 0, 0, 0, 0)
    blocks = pool.allocate(2)
    pool.remember(blocks[0], block_key(b"", [1]))
    assert counts(pool.ledger()) == (2, 0, 2, 0, 0, 0)
    pool.lease(blocks)
    assert counts(pool.ledger()) == (2, 0, 0, 2, 0, 0)
    pool.pin_reserved(blocks)
    pool.pin_reserved(blocks)
    assert counts(pool.ledger()) == (2, 0, 0, 0, 2, 0)
    pool.quarantine(blocks[1:])
    assert counts(pool.ledger()) == (2, 0, 0, 0, 1, 1)
    pool.unreserve(blocks)
    pool.unreserve(blocks[:1])
    assert counts(pool.ledger()) == (2, 0, 0, 1, 0, 1)
    pool.unlease(blocks)
    pool.release(blocks)
    assert counts(pool.ledger()) == (2, 1, 0, 0, 0, 1)
    pool.unquarantine(blocks[1:])
    assert counts(pool.ledger()) == (3, 1, 0, 0, 0, 0)
    pool.share(blocks[:1])
    assert counts(pool.ledger()) == (3, 0, 1, 0, 0, 0)
    pool.release(blocks[:1])
    pool.allocate(4)
    assert counts(pool.ledger()) == (0, 0, 4, 0, 0, 0)
    with pytest.raises(OutOfBlocks):
        pool.reserve(1)
    pool.check()


def test_counts_follow_every_change() -> None:
    """Against a recount, with holders of all kinds taken and dropped in any order."""
    draw = random.Random(3)
    pool = pool_of(12)
    drops: list[tuple[Callable[[list[int]], None], list[int]]] = []
    for turn in range(4000):
        if drops and (draw.random() < 0.5 or not pool.available):
            drop, blocks = drops.pop(draw.randrange(len(drops)))
            drop(blocks)
        else:
            blocks = pool.allocate(draw.randint(1, pool.available))
            drops.append((pool.release, blocks))
            some = draw.sample(blocks, draw.randint(1, len(blocks)))
            kind = draw.choice(["share", "lease", "reserve", "quarantine", "remember"])
            if kind == "remember":
                for block in some:
                    pool.remember(block, block_key(b"", [turn, block]))
            elif kind == "quarantine":
                pool.pin_reserved(some)
                pool.quarantine(some)
                drops.append((pool.unquarantine, some))
            else:
                pin, drop = {
                    "share": (pool.share, pool.release),
                    "lease": (pool.lease, pool.unlease),
                    "reserve": (pool.pin_reserved, pool.unreserve),
                }[kind]
                pin(some)
                drops.append((drop, some))
        pool.check()
    for drop, blocks in drops:
        drop(blocks)
    assert pool.ledger().idle
    assert pool.evictions > 0


WRONG: dict[str, Callable[[BlockPool, list[int]], None]] = {
    "released twice": lambda pool, held: pool.release([*held, *held]),
    "unleased, but never leased": lambda pool, held: pool.unlease(held),
    "a reservation that was none": lambda pool, held: pool.unreserve(held),
    "a read that was none": lambda pool, held: pool.unquarantine(held),
    "a free block is leased": lambda pool, held: pool.lease([held[-1] + 1]),
    "a free block is shared": lambda pool, held: pool.share([held[-1] + 1]),
    "a free block is remembered": lambda pool, held: pool.remember(held[-1] + 1, b"key"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_contradicts_the_ledger_is_a_fault(wrong: str) -> None:
    pool = pool_of()
    held = pool.allocate(3)
    with pytest.raises(LedgerFault):
        WRONG[wrong](pool, held)


class Broken:
    """Ways in which a pool can be wrong inside, which only a bug of its own could cause."""

    @staticmethod
    def a_block_is_in_no_list(pool: BlockPool) -> None:
        pool._free.take(1)

    @staticmethod
    def a_count_is_off(pool: BlockPool) -> None:
        pool._counts[2] += 1

    @staticmethod
    def a_block_is_counted_in_another_state(pool: BlockPool) -> None:
        pool._counts[0] -= 1
        pool._counts[2] += 1

    @staticmethod
    def an_evictable_block_is_gone(pool: BlockPool) -> None:
        pool._evictable.popitem()


BREAKS = [
    Broken.a_block_is_in_no_list,
    Broken.a_count_is_off,
    Broken.a_block_is_counted_in_another_state,
    Broken.an_evictable_block_is_gone,
]


def pool_in_use() -> BlockPool:
    pool = pool_of()
    blocks = pool.allocate(4)
    pool.remember(blocks[0], b"key")
    pool.release(blocks[:2])
    pool.verify()
    return pool


@pytest.mark.parametrize("breaks", BREAKS)
def test_verify_sees_it_without_a_recount(breaks: Callable[[BlockPool], None]) -> None:
    pool = pool_in_use()
    breaks(pool)
    with pytest.raises(LedgerFault, match="does not add up"):
        pool.verify()


def test_a_recount_finds_what_sums_cannot_show() -> None:
    pool = pool_in_use()
    (lost,) = pool._free.take(1)
    pool._free.add(3)  # owned; the next to come will get it, too
    pool.verify()
    assert {block for _, block in pool.faults()} == {lost, 3}
    with pytest.raises(LedgerFault):
        pool.check()


# -- the audit ----------------------------------------------------------------------------------


def known_of(scheduler: Scheduler, *names: str) -> Known:
    return Known(frozenset((RequestId(name), 0) for name in names), reservations=frozenset())


def running() -> Scheduler:
    scheduler = scheduler_of()
    oracle = PagedOracle(BLOCKS, BLOCK)
    scheduler.add(request_of("a"), export=False)
    step = scheduler.schedule()
    scheduler.commit(step, oracle.compute(step))
    assert scheduler.audit(known_of(scheduler, "a")) == set()
    return scheduler


def test_a_leaked_block_is_found_although_the_sums_add_up() -> None:
    scheduler = running()
    leaked = scheduler.pool.allocate(2)
    scheduler.pool.check()
    found = lines(scheduler.audit(known_of(scheduler, "a")))
    assert found == [f"blocks {leaked[0]}, {leaked[1]}: is owned, but for no sequence"]


def test_a_block_held_once_too_often_is_found() -> None:
    scheduler = running()
    scheduler.pool.share([0])
    scheduler.pool.check()
    assert scheduler.audit(known_of(scheduler, "a")) == {("is owned, but for no sequence", 0)}


@pytest.mark.parametrize("state", ["leased", "quarantined"])
def test_holds_that_the_worker_knows_otherwise_are_found(state: str) -> None:
    scheduler = running()
    requests = frozenset({(RequestId("a"), 0)})

    def known(blocks: list[int]) -> Known:
        told = Counter(blocks)
        return Known(requests, told) if state == "leased" else Known(requests, quarantined=told)

    assert scheduler.audit(known([5])) != set()
    blocks = scheduler.pool.reserve(1)
    if state == "quarantined":
        scheduler.pool.quarantine(blocks)
    else:
        scheduler.pool.lease(blocks)
        scheduler.pool.unreserve(blocks)
    assert scheduler.audit(known(blocks)) == set()
    assert [block for _, block in scheduler.audit(known([]))] == blocks
    assert scheduler.audit(known([*blocks, *blocks])) != set()


def test_a_sequence_that_nobody_asked_for_is_found() -> None:
    scheduler = running()
    (line,) = lines(scheduler.audit(known_of(scheduler)))
    assert line == "a sequence of request a, attempt 0, which the worker does not know"


def test_a_reservation_that_no_handoff_has_is_found() -> None:
    scheduler = running()
    lost = scheduler.reserve(request_of("lost"))
    kept = scheduler.reserve(request_of("kept"))
    requests = frozenset({(RequestId("a"), 0)})
    known = Known(requests, reservations=frozenset({kept}))
    (line,) = lines(scheduler.audit(known))
    assert line == "no handoff has the reservation of request lost, attempt 0"
    scheduler.unreserve(lost)
    assert scheduler.audit(known) == set()
    scheduler.unreserve(kept)
    (line,) = lines(scheduler.audit(known))
    assert line == "a handoff has a reservation of request kept, attempt 0 that is over"


def test_many_blocks_are_one_line() -> None:
    (line,) = lines(("is owned, but for no sequence", block) for block in range(30))
    assert line.startswith("blocks 0, 1, 2, 3, 4, 5, 6, 7 and 22 more: ")


# -- in the engine ------------------------------------------------------------------------------


class Computer:
    def __init__(self) -> None:
        self.oracle = PagedOracle(BLOCKS, BLOCK)

    def forget(self, sequences: Sequence[int]) -> None:
        pass

    def compute(self, plan: StepPlan) -> StepResult:
        return self.oracle.compute(plan)


def test_a_fault_of_the_ledger_ends_the_engine_before_anything_is_told() -> None:
    scheduler = scheduler_of()
    told: list[EngineEvent] = []
    failures: Queue[BaseException] = Queue()
    engine = Engine(scheduler, Computer(), told.extend, failures.put)

    def begin(scheduler: Scheduler) -> None:
        scheduler.add(request_of("a"), export=False)
        scheduler.pool._counts[2] += 1

    engine.call(begin)
    engine.start()
    assert isinstance(failures.get(timeout=WAIT_S), LedgerFault)
    engine.stop()
    assert told == []
    with pytest.raises(Exception, match="the engine failed: LedgerFault"):
        engine.assert_pulse()


def test_a_command_that_breaks_the_ledger_ends_the_engine_too() -> None:
    """Whoever asked may not look at the future: nothing would go on with a half-dropped lease."""
    failures: Queue[BaseException] = Queue()
    engine = Engine(scheduler_of(), Computer(), lambda events: None, failures.put)
    wrong = engine.call(lambda scheduler: scheduler.pool.unlease([1]))
    later = engine.call(lambda scheduler: scheduler.load())
    engine.start()
    assert isinstance(failures.get(timeout=WAIT_S), LedgerFault)
    engine.stop()
    assert isinstance(wrong.exception(WAIT_S), LedgerFault)
    assert later.exception(WAIT_S) is not None, "the pool is of no more use"


def test_a_paused_engine_makes_no_step_until_it_is_resumed() -> None:
    scheduler = scheduler_of()
    engine = Engine(scheduler, Computer(), lambda events: None)
    engine.start()
    try:
        step = engine.pause(60.0).result(WAIT_S)
        engine.call(lambda s: s.add(request_of("a"), export=False)).result(WAIT_S)
        known = known_of(scheduler, "a")
        for _ in range(5):
            assert engine.audit(step, known).result(WAIT_S) == set()
        assert engine.load.waiting == 1
        engine.resume()
        while engine.steps < 2:
            engine.call(lambda s: None).result(WAIT_S)
        assert engine.audit(step, known).result(WAIT_S) is None, "it was no quiet moment"
    finally:
        engine.stop()


def test_a_pause_ends_by_itself() -> None:
    engine = Engine(scheduler_of(), Computer(), lambda events: None)
    engine.start()
    try:
        engine.pause(0.01)
        engine.call(lambda s: s.add(request_of("a"), export=False)).result(WAIT_S)
        while engine.steps < 2:
            engine.call(lambda s: None).result(WAIT_S)
    finally:
        engine.stop()


def test_the_load_is_the_ledger_of_one_moment() -> None:
    scheduler = running()
    load = scheduler.load()
    assert Ledger(load.total_blocks, *(getattr(load, s) for s in Ledger.STATES)).balanced
    assert load.owned == 3
