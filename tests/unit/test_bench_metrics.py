"""The metric definitions, one row a rule."""

import pytest

from benchmarks.metrics import (
    Chunk,
    Limits,
    Phase,
    RequestRecord,
    gap_cv,
    index_of_dispersion,
    mean_concurrency,
    percentile,
    quantiles,
    spread_tokens,
    tokens_in_window,
    wilson_interval,
)


def record(
    *chunks: tuple[float, int],
    intended_s: float = 0.0,
    sent_s: float | None = 0.0,
    completion_tokens: int | None = None,
    error: str = "",
    end_s: float | None = None,
) -> RequestRecord:
    total = sum(tokens for _, tokens in chunks)
    return RequestRecord(
        index=0,
        phase=Phase.WINDOW,
        intended_s=intended_s,
        wanted_tokens=total,
        sent_s=sent_s,
        chunks=tuple(Chunk(at_s, tokens) for at_s, tokens in chunks),
        end_s=end_s if end_s is not None else (chunks[-1][0] if chunks else None),
        completion_tokens=total if completion_tokens is None else completion_tokens,
        error=error,
    )


@pytest.mark.parametrize(
    ("sample", "name", "value"),
    [
        pytest.param(record((3.0, 1), intended_s=1.0, sent_s=2.0), "ttft_s", 2.0, id="from-a"),
        pytest.param(record((3.0, 1), intended_s=1.0, sent_s=2.0), "ttft_wire_s", 1.0, id="from-s"),
        pytest.param(record((3.0, 1), intended_s=1.0, sent_s=2.0), "send_lag_s", 1.0, id="lag"),
        pytest.param(record((1.0, 1), (2.0, 1), (4.0, 1)), "tpot_s", 1.5, id="n-minus-1"),
        pytest.param(record((1.0, 3), (4.0, 2)), "tpot_s", 1.5, id="n-minus-first-chunk"),
        pytest.param(record((1.0, 1), (4.0, 1), completion_tokens=4), "tpot_s", 1.0, id="usage-n"),
        pytest.param(record((1.0, 5)), "tpot_s", None, id="all-at-once"),
        pytest.param(record((1.0, 1), (2.5, 1), (3.0, 1)), "gaps_s", (1.5, 0.5), id="itl"),
        pytest.param(record((1.0, 1), (2.5, 1), (3.0, 1)), "tt2t_s", 1.5, id="first-gap"),
        pytest.param(record((1.0, 1)), "tt2t_s", None, id="one-chunk-has-no-gap"),
        pytest.param(
            record((0.0, 1), (5.0, 1), (6.0, 1), (8.0, 1), (9.0, 1)),
            "handoff_overhead_s",
            4.0,
            id="first-gap-over-median-of-later-ones",
        ),
        pytest.param(
            record((0.0, 1), (1.0, 1), (3.0, 1)), "handoff_overhead_s", 0.0, id="never-negative"
        ),
        pytest.param(
            record((2.0, 1), (7.0, 1), intended_s=1.0, end_s=9.0), "e2e_s", 6.0, id="not-done"
        ),
        pytest.param(record(error="timeout"), "ttft_s", None, id="nothing-came"),
        pytest.param(record(sent_s=None), "send_lag_s", None, id="never-sent"),
        pytest.param(record((1.0, 1), error="cut off"), "ok", False, id="error-is-no-success"),
        pytest.param(record(), "ok", False, id="no-tokens-is-no-success"),
    ],
)
def test_per_request(sample: RequestRecord, name: str, value: object) -> None:
    assert getattr(sample, name) == value


@pytest.mark.parametrize(
    ("values", "q", "result"),
    [
        pytest.param([5.0], 99, 5.0, id="one"),
        pytest.param([3.0, 1.0, 2.0], 50, 2.0, id="unsorted"),
        pytest.param([0.0, 10.0], 90, 9.0, id="interpolated"),
        pytest.param([0.0, 10.0], 100, 10.0, id="maximum"),
        pytest.param([0.0, 10.0], 0, 0.0, id="minimum"),
    ],
)
def test_percentile(values: list[float], q: float, result: float) -> None:
    assert percentile(values, q) == pytest.approx(result)


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)
    assert quantiles([None, None]) is None


def test_quantiles_skip_what_is_undefined() -> None:
    sample = quantiles([None, 1.0, 3.0])
    assert sample is not None
    assert (sample.count, sample.mean, sample.p50, sample.maximum) == (2, 2.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("limits", "sample", "met"),
    [
        pytest.param(Limits(ttft_s=2.0), record((2.0, 1)), True, id="at-the-limit"),
        pytest.param(Limits(ttft_s=2.0), record((2.1, 1)), False, id="ttft"),
        pytest.param(Limits(tpot_s=1.0), record((0.0, 1), (2.0, 1)), False, id="tpot"),
        pytest.param(Limits(tpot_s=1.0), record((0.0, 9)), True, id="undefined-tpot-is-no-miss"),
        pytest.param(Limits(e2e_s=1.0), record((0.0, 1), (2.0, 1)), False, id="e2e"),
        pytest.param(Limits(ttft_s=9.0), record((1.0, 1), error="x"), False, id="error-misses"),
        pytest.param(Limits(), record(), False, id="no-tokens-miss"),
    ],
)
def test_limits(limits: Limits, sample: RequestRecord, met: bool) -> None:
    assert limits.met_by(sample) is met


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [
        pytest.param(0, 0, 0.0, 1.0, id="nothing-known"),
        pytest.param(95, 100, 0.8882, 0.9785, id="textbook"),
        pytest.param(10, 10, 0.7225, 1.0, id="all"),
    ],
)
def test_wilson(hits: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(hits, trials) == pytest.approx((low, high), abs=1e-4)


def test_concurrency_counts_what_lies_in_the_window() -> None:
    requests = [
        record((0.0, 1), intended_s=-5.0, end_s=2.0),  # from the warm-up: 2 s
        record((0.0, 1), intended_s=1.0, end_s=4.0),  # 3 s
        record((0.0, 1), intended_s=9.0, end_s=20.0),  # 1 s
        record((0.0, 1), intended_s=12.0, end_s=13.0),  # after it
    ]
    assert mean_concurrency(requests, 10.0) == pytest.approx(0.6)


def test_tokens_in_window_is_half_open() -> None:
    requests = [record((-0.1, 7), (0.0, 1), (9.9, 2), (10.0, 4))]
    assert tokens_in_window(requests, 10.0) == 3


def test_burstiness_of_known_schedules() -> None:
    regular = [float(second) for second in range(100)]
    assert gap_cv(regular) == 0.0
    assert index_of_dispersion(regular, 100.0, 10.0) == 0.0
    assert gap_cv([0.0, 1.0]) is None
    assert index_of_dispersion(regular, 10.0, 10.0) is None
    bursts = [10.0 * burst + step / 100 for burst in range(10) for step in range(10)]
    cv = gap_cv(bursts)
    dispersion = index_of_dispersion(bursts, 100.0, 1.0)
    assert cv is not None
    assert cv > 2
    assert dispersion == pytest.approx(9.0)  # ten in one of ten bins: variance 9, mean 1


@pytest.mark.parametrize(
    ("chunks", "tokens", "sizes"),
    [
        pytest.param(3, 3, (1, 1, 1), id="one-each"),
        pytest.param(3, 8, (1, 3, 4), id="first-is-one"),
        pytest.param(1, 8, (8,), id="all-in-one"),
        pytest.param(2, 0, (0, 0), id="no-usage"),
        pytest.param(0, 5, (), id="nothing-seen"),
    ],
)
def test_spread_tokens(chunks: int, tokens: int, sizes: tuple[int, ...]) -> None:
    assert spread_tokens(chunks, tokens) == sizes
