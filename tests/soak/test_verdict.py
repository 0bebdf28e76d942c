"""The soak's rules on made-up runs: growth is found, noise is not called growth."""

import math
import random
from collections.abc import Callable

import pytest

from tests.soak.verdict import judge_count, judge_memory, scatter, theil_sen

MIB = 1 << 20
HOURS = 2.0
Curve = Callable[[float], float]  # MiB after so many hours


def points(
    curve: Curve, *, noise_mib: float, seed: int, count: int = 80
) -> list[tuple[float, float]]:
    draws = random.Random(seed)
    times = [HOURS * 3600 * index / count for index in range(count)]
    return [(t, (500 + curve(t / 3600) + draws.gauss(0, noise_mib)) * MIB) for t in times]


@pytest.mark.parametrize(
    ("curve", "noise_mib"),
    [
        pytest.param(lambda h: 0.0, 0.0, id="still"),
        pytest.param(lambda h: 0.0, 5.0, id="noise"),
        pytest.param(lambda h: 120 * min(1.0, h / 0.6), 1.0, id="warm-up"),
        pytest.param(lambda h: 100 * (1 - math.exp(-3 * h)), 1.0, id="a-cache-fills"),
        pytest.param(lambda h: 40.0 if h > 1.1 else 0.0, 1.0, id="one-step"),
        pytest.param(lambda h: -30 * h, 1.0, id="falls"),
        pytest.param(lambda h: 20 * math.sin(12 * h), 1.0, id="waves"),
        pytest.param(lambda h: 1.0 * h, 0.5, id="below-the-limit"),
    ],
)
def test_no_growth_is_seen_where_there_is_none(curve: Curve, noise_mib: float) -> None:
    for seed in range(20):
        finding = judge_memory("router", "rss", points(curve, noise_mib=noise_mib, seed=seed))
        assert finding.flat, f"seed {seed}: {finding}"
        assert finding.slope_mib_h is not None


@pytest.mark.parametrize(
    ("curve", "noise_mib"),
    [
        pytest.param(lambda h: 12 * h, 0.5, id="slow"),
        pytest.param(lambda h: 30 * h, 5.0, id="under-noise"),
        pytest.param(lambda h: 100 * min(1, h) + 25 * h, 1.0, id="behind-a-warm-up"),
        pytest.param(lambda h: 15 * math.floor(4 * h), 1.0, id="in-steps"),
        pytest.param(lambda h: 40 * h if round(h * 40) % 9 else 900.0, 1.0, id="with-outliers"),
    ],
)
def test_growth_is_found(curve: Curve, noise_mib: float) -> None:
    for seed in range(20):
        finding = judge_memory("router", "rss", points(curve, noise_mib=noise_mib, seed=seed))
        assert not finding.flat, f"seed {seed}: {finding}"
        assert "MiB/h" in finding.detail


def test_a_short_run_says_that_it_is_too_short() -> None:
    finding = judge_memory("router", "rss", points(lambda h: 500 * h, noise_mib=0, seed=1, count=6))
    assert finding.flat
    assert finding.slope_mib_h is None
    assert "too few" in finding.detail


def test_the_line_goes_through_the_most() -> None:
    line = [(float(t), 3.0 * t + 7) for t in range(20)]
    line[4] = (4.0, 1e9)
    assert theil_sen(line) == pytest.approx(3.0)
    assert scatter(line, 3.0) == pytest.approx(0.0)
    assert theil_sen([(0.0, 5.0)]) == 0.0


@pytest.mark.parametrize(
    ("values", "room", "flat"),
    [
        pytest.param([9, 12, 30, 30, 30, 30], 0, True, id="after-a-warm-up"),
        pytest.param([30, 30, 30, 30, 30, 31], 0, False, id="one-more-at-the-end"),
        pytest.param([30, 30, 30, 31, 30, 30], 0, False, id="one-that-came-and-went"),
        pytest.param([30, 31, 32, 33, 34, 35], 2, False, id="on-and-on"),
        pytest.param([30, 30, 30, 31, 32, 32], 2, True, id="a-pool-fills"),
        pytest.param([4, 4, 3], 0, False, id="three-points"),
        pytest.param([], 0, True, id="none"),
    ],
)
def test_counts(values: list[int], room: int, flat: bool) -> None:
    finding = judge_count("decode", "fds", values, room)
    assert finding.flat is flat
    assert bool(finding.detail) is (not flat or not values)
