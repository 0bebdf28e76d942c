"""The quarantine's books, and when a worker that cannot empty it asks to be replaced."""

import pytest

from contracts.errors import EngineFailure
from decode_worker.health import QuarantineWatch
from decode_worker.quarantine import Quarantine


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_blocks_are_free_when_the_read_that_may_write_them_has_ended(clock: Clock) -> None:
    freed: list[tuple[int, ...]] = []
    quarantine = Quarantine(freed.append, clock)
    quarantine.posted("a", [1, 2])
    quarantine.posted("b", [2, 3])
    quarantine.posted("c", [7])
    assert not quarantine.blocks(), "a read whose request lives holds nothing in quarantine"
    assert quarantine.begin(["a", "b"]) == {1, 2, 3}
    assert quarantine.blocks() == {1: 1, 2: 2, 3: 1}
    clock.now += 4.0
    assert quarantine.oldest_s == 4.0
    quarantine.terminal("a")
    quarantine.end("a")
    assert freed == [(1, 2)]
    assert quarantine.blocks() == {2: 1, 3: 1}
    quarantine.terminal("c")
    quarantine.terminal("b")
    quarantine.end("b")
    assert quarantine.oldest_s == 0.0
    assert not quarantine.blocks()


@pytest.mark.parametrize(
    ("held", "age_s", "draining"), [(30, 11.0, True), (30, 9.0, False), (20, 60.0, False)]
)
def test_a_worker_drains_when_much_is_held_for_long(
    clock: Clock, held: int, age_s: float, draining: bool
) -> None:
    quarantine = Quarantine(lambda blocks: None, clock)
    watch = QuarantineWatch(quarantine, limit_s=10.0, drain_s=30.0, clock=clock)
    quarantine.posted("a", range(held))
    clock.now += 100.0  # as long as its request lived does not count
    quarantine.begin(["a"])
    clock.now += age_s
    assert watch.look(total_blocks=100) is draining
    assert watch.draining is draining


def test_it_is_replaced_once_nothing_runs_or_it_has_waited_long_enough(clock: Clock) -> None:
    quarantine = Quarantine(lambda blocks: None, clock)
    watch = QuarantineWatch(quarantine, limit_s=10.0, drain_s=30.0, clock=clock)
    quarantine.posted("a", range(50))
    quarantine.begin(["a"])
    watch.check(num_requests=0)
    clock.now += 10.5
    watch.look(total_blocks=100)
    watch.check(num_requests=1)
    with pytest.raises(EngineFailure, match="50 KV blocks"):
        watch.check(num_requests=0)
    clock.now += 31.0
    with pytest.raises(EngineFailure):
        watch.check(num_requests=1)


def test_reads_that_end_after_all_let_it_serve_again(clock: Clock) -> None:
    quarantine = Quarantine(lambda blocks: None, clock)
    watch = QuarantineWatch(quarantine, limit_s=10.0, clock=clock)
    quarantine.posted("a", range(50))
    quarantine.begin(["a"])
    clock.now += 11.0
    assert watch.look(total_blocks=100)
    quarantine.terminal("a")
    quarantine.end("a")
    assert watch.look(total_blocks=100)
    assert not watch.draining
    watch.check(num_requests=0)
