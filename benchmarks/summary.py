"""From raw records to the figures of a run, and the verdict whether they may be believed."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.metrics import (
    Limits,
    Phase,
    Quantiles,
    RequestRecord,
    gap_cv,
    index_of_dispersion,
    mean_concurrency,
    percentile,
    quantiles,
    tokens_in_window,
    wilson_interval,
)

MAX_SEND_LAG_S = 0.005
MAX_RATE_ERROR = 0.02
MAX_LITTLE_ERROR = 0.05
MAX_TOKEN_ERROR = 0.01


@dataclass(frozen=True, slots=True)
class Attainment:
    """How many of all arrivals met the limits; errors and short outputs are misses."""

    met: int
    arrivals: int
    share: float
    low: float  # Wilson interval, 95 %
    high: float
    goodput_requests_per_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run. Latencies in seconds, of the window's successful requests."""

    window_s: float
    arrivals: int
    succeeded: int
    errors: dict[str, int]
    offered_rate_per_s: float
    completed_rate_per_s: float
    output_tokens_per_s: float
    mean_concurrency: float
    prompt_tokens: Quantiles | None
    completion_tokens: Quantiles | None
    cached_tokens: int
    ttft_s: Quantiles | None
    ttft_wire_s: Quantiles | None
    tpot_s: Quantiles | None
    itl_s: Quantiles | None
    stall_s: Quantiles | None  # the longest gap of each request
    tt2t_s: Quantiles | None
    handoff_overhead_s: Quantiles | None
    e2e_s: Quantiles | None
    send_lag_s: Quantiles | None
    schedule_gap_cv: float | None
    schedule_dispersion_1s: float | None
    schedule_dispersion_10s: float | None
    attainment: Attainment | None


def summarise(
    records: Sequence[RequestRecord], window_s: float, limits: Limits | None = None
) -> Summary:
    """All figures of a run.

    Args:
        records: every request that was sent, of all phases.
        window_s: the length of the measured window. It is the divisor of every rate.
        limits: None: no attainment is computed.
    """
    window = [record for record in records if record.phase is Phase.WINDOW]
    good = [record for record in window if record.ok]
    arrivals = sorted(record.intended_s for record in window)
    return Summary(
        window_s=window_s,
        arrivals=len(window),
        succeeded=len(good),
        errors=dict(sorted(Counter(_error(record) for record in window if not record.ok).items())),
        offered_rate_per_s=len(window) / window_s,
        completed_rate_per_s=len(good) / window_s,
        output_tokens_per_s=tokens_in_window(records, window_s) / window_s,
        mean_concurrency=mean_concurrency(records, window_s),
        prompt_tokens=quantiles(record.prompt_tokens for record in good),
        completion_tokens=quantiles(record.completion_tokens for record in good),
        cached_tokens=sum(record.cached_tokens for record in good),
        ttft_s=quantiles(record.ttft_s for record in good),
        ttft_wire_s=quantiles(record.ttft_wire_s for record in good),
        tpot_s=quantiles(record.tpot_s for record in good),
        itl_s=quantiles(gap for record in good for gap in record.gaps_s),
        stall_s=quantiles(max(record.gaps_s, default=None) for record in good),
        tt2t_s=quantiles(record.tt2t_s for record in good),
        handoff_overhead_s=quantiles(record.handoff_overhead_s for record in good),
        e2e_s=quantiles(record.e2e_s for record in good),
        send_lag_s=quantiles(record.send_lag_s for record in window),
        schedule_gap_cv=gap_cv(arrivals),
        schedule_dispersion_1s=index_of_dispersion(arrivals, window_s, 1.0),
        schedule_dispersion_10s=index_of_dispersion(arrivals, window_s, 10.0),
        attainment=None if limits is None else _attainment(window, window_s, limits),
    )


def _error(record: RequestRecord) -> str:
    return record.error or "no tokens"


def _attainment(window: Sequence[RequestRecord], window_s: float, limits: Limits) -> Attainment:
    met = sum(limits.met_by(record) for record in window)
    low, high = wilson_interval(met, len(window))
    share = met / len(window) if window else 0.0
    return Attainment(met, len(window), share, low, high, met / window_s)


def reasons_against(
    records: Sequence[RequestRecord], window_s: float, limits: Limits | None = None
) -> tuple[str, ...]:
    """Why the run may not be believed; empty for a valid run.

    The achieved rate is compared with the schedule's, not with the rate asked for: a Poisson
    sample of a few requests is off by its nature, and that is no fault of the client.
    """
    window = [record for record in records if record.phase is Phase.WINDOW]
    sent = [record for record in window if record.sent_s is not None]
    good = [record for record in window if record.ok]
    if not good:
        return ("no request succeeded",)
    reasons: list[str] = []
    if len(sent) < len(window):
        reasons.append(f"{len(window) - len(sent)} of {len(window)} requests were never sent")

    allowed_s = MAX_SEND_LAG_S
    if limits is not None and limits.ttft_s is not None:
        allowed_s = max(allowed_s, 0.02 * limits.ttft_s)
    lag_s = percentile([record.send_lag_s or 0.0 for record in sent], 99)
    if lag_s > allowed_s:
        reasons.append(
            f"late client: p99 send lag {lag_s * 1e3:.1f} ms, allowed {allowed_s * 1e3:.1f} ms"
        )

    error = _rate_error(sent)
    if error > MAX_RATE_ERROR:
        reasons.append(
            f"achieved rate is {error:.1%} off the schedule, allowed {MAX_RATE_ERROR:.0%}"
        )

    concurrency = mean_concurrency(records, window_s)
    spans = [record.end_s - record.intended_s for record in window if record.end_s is not None]
    by_little = len(window) / window_s * math.fsum(spans) / len(spans)
    error = abs(concurrency - by_little) / concurrency if concurrency > 0 else 1.0
    if error > MAX_LITTLE_ERROR:
        reasons.append(
            f"not steady: mean concurrency {concurrency:.2f}, by Little's law {by_little:.2f} "
            f"({error:.0%} apart, allowed {MAX_LITTLE_ERROR:.0%}); lengthen the window"
        )

    wanted = sum(record.wanted_tokens for record in good)
    received = sum(record.completion_tokens for record in good)
    counted = sum(chunk.tokens for record in good for chunk in record.chunks)
    for what, count in (("reported by usage", received), ("seen in the streams", counted)):
        if abs(count - wanted) > MAX_TOKEN_ERROR * wanted:
            reasons.append(f"{wanted} output tokens asked for, {count} {what}")
    return tuple(reasons)


def _rate_error(sent: Sequence[RequestRecord]) -> float:
    """Relative difference between the spans over which requests were due and were sent."""
    due = [record.intended_s for record in sent]
    stamps = [record.sent_s for record in sent if record.sent_s is not None]
    due_span, sent_span = max(due) - min(due), max(stamps) - min(stamps)
    return abs(sent_span - due_span) / due_span if due_span > 0 else 0.0
