"""Free blocks are kept in runs, and none is lost or given twice."""

from hypothesis import given
from hypothesis import strategies as st

from engine.free_runs import FreeRuns


@given(
    total=st.integers(1, 40),
    actions=st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.integers(0, 40))),
)
def test_runs_hold_what_a_set_holds(total: int, actions: list[tuple[bool, int, int]]) -> None:
    runs, free = FreeRuns(total), set(range(total))
    for take, count, block in actions:
        if take and count <= len(runs):
            taken = runs.take(count, after=block)
            assert len(set(taken)) == count
            assert set(taken) <= free
            free -= set(taken)
        elif not take and block < total and block not in free:
            runs.add(block)
            free.add(block)
        assert len(runs) == len(free)
    assert sorted(runs.take(len(free))) == sorted(free)


def test_a_fresh_pool_gives_one_run_and_growth_continues_it() -> None:
    runs = FreeRuns(10)
    assert runs.take(4) == [0, 1, 2, 3]
    assert runs.take(1, after=3) == [4]
    runs.add(1)
    assert runs.take(1) == [1], "the smallest run that fits"
    for block in (0, 1, 2, 3, 4):
        runs.add(block)
    assert runs.take(10) == list(range(10)), "neighbours have merged"
