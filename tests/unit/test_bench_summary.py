"""Which records count, and what makes a run invalid."""

from dataclasses import replace

import pytest

from benchmarks.metrics import Chunk, Limits, Phase, RequestRecord
from benchmarks.summary import reasons_against, summarise

WINDOW_S = 100.0


def steady(lag_s: float = 0.001) -> list[RequestRecord]:
    """One request a second, each two seconds long with four tokens: a valid run."""
    return [
        RequestRecord(
            index=index,
            phase=Phase.WARMUP
            if arrival < 0
            else Phase.WINDOW
            if arrival < WINDOW_S
            else Phase.TAIL,
            intended_s=float(arrival),
            wanted_tokens=4,
            sent_s=arrival + lag_s,
            chunks=tuple(Chunk(arrival + 0.5 + 0.5 * k, 1) for k in range(4)),
            end_s=arrival + 2.0,
            prompt_tokens=10,
            completion_tokens=4,
            cached_tokens=1,
        )
        for index, arrival in enumerate(range(-5, 103))
    ]


def test_only_the_window_is_measured_and_tokens_by_arrival() -> None:
    summary = summarise(steady(), WINDOW_S)
    assert (summary.arrivals, summary.succeeded, summary.errors) == (100, 100, {})
    assert summary.offered_rate_per_s == 1.0
    assert summary.output_tokens_per_s == pytest.approx(4.0, abs=0.05)
    assert summary.mean_concurrency == pytest.approx(2.0)
    assert summary.cached_tokens == 100
    assert summary.ttft_s is not None
    assert summary.ttft_s.p99 == pytest.approx(0.5)
    assert summary.tpot_s is not None
    assert summary.tpot_s.mean == pytest.approx(0.5)
    assert summary.itl_s is not None
    assert summary.itl_s.count == 300
    assert summary.attainment is None


def test_failures_are_counted_by_kind_and_never_timed() -> None:
    records = steady()
    records[10] = replace(records[10], error="http 429", chunks=())
    records[11] = replace(records[11], error="http 429", chunks=())
    records[12] = replace(records[12], error="cut off")
    records[13] = replace(records[13], chunks=())
    summary = summarise(records, WINDOW_S, Limits(ttft_s=1.0))
    assert summary.errors == {"cut off": 1, "http 429": 2, "no tokens": 1}
    assert summary.succeeded == 96
    assert summary.ttft_s is not None
    assert summary.ttft_s.count == 96
    assert summary.send_lag_s is not None
    assert summary.send_lag_s.count == 100
    assert summary.attainment is not None
    assert (summary.attainment.met, summary.attainment.arrivals) == (96, 100)
    assert summary.attainment.low < 0.96 < summary.attainment.high
    assert summary.attainment.goodput_requests_per_s == pytest.approx(0.96)


def test_a_steady_run_is_valid() -> None:
    assert reasons_against(steady(), WINDOW_S) == ()


def late(records: list[RequestRecord]) -> list[RequestRecord]:
    """Two of the hundred are sent 6 ms late."""
    return [replace(r, sent_s=r.intended_s + 0.006) if r.index in (20, 21) else r for r in records]


def slowing(records: list[RequestRecord]) -> list[RequestRecord]:
    """Latency grows all the time: the server is past its limit."""
    return [replace(r, end_s=r.intended_s + 2.0 + max(0.0, r.intended_s)) for r in records]


def one_late_start(records: list[RequestRecord]) -> list[RequestRecord]:
    """The last of the window goes out three seconds late."""
    return [replace(r, sent_s=r.intended_s + 3.0) if r.intended_s == 99.0 else r for r in records]


def unsent(records: list[RequestRecord]) -> list[RequestRecord]:
    return [
        replace(r, sent_s=None, chunks=(), error="unfinished") if r.index == 20 else r
        for r in records
    ]


def short(records: list[RequestRecord]) -> list[RequestRecord]:
    return [replace(r, wanted_tokens=5) for r in records]


def hidden_tokens(records: list[RequestRecord]) -> list[RequestRecord]:
    """Usage claims what the streams did not show."""
    return [replace(r, chunks=r.chunks[:3]) for r in records]


def failing(records: list[RequestRecord]) -> list[RequestRecord]:
    return [replace(r, error="http 503", chunks=()) for r in records]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(late, "late client: p99 send lag 6.0 ms, allowed 5.0 ms", id="send-lag"),
        pytest.param(one_late_start, "achieved rate is 3.0% off", id="rate"),
        pytest.param(slowing, "not steady", id="little"),
        pytest.param(unsent, "1 of 100 requests were never sent", id="never-sent"),
        pytest.param(short, "500 output tokens asked for, 400 reported by usage", id="usage"),
        pytest.param(hidden_tokens, "400 output tokens asked for, 300 seen", id="streams"),
        pytest.param(failing, "no request succeeded", id="all-failed"),
    ],
)
def test_what_makes_a_run_invalid(change: object, reason: str) -> None:
    assert callable(change)
    reasons = reasons_against(change(steady()), WINDOW_S)
    assert any(text.startswith(reason) for text in reasons), reasons


def test_a_slack_ttft_limit_allows_more_lag() -> None:
    records = steady(lag_s=0.006)
    assert reasons_against(records, WINDOW_S) != ()
    assert reasons_against(records, WINDOW_S, Limits(ttft_s=1.0)) == ()
