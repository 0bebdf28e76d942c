"""What a run looks like on a terminal."""

from collections.abc import Sequence
from typing import Any

from benchmarks.client import Recording
from benchmarks.metrics import Quantiles
from benchmarks.summary import Summary


def progress_line(
    recordings: Sequence[Recording], in_flight: int, now_s: float, window_s: float
) -> str:
    """The run so far, in one line. `now_s` counts from the start of the window."""
    if now_s < 0:
        place = f"warm-up, {-now_s:.0f} s left"
    elif now_s < window_s:
        place = f"{now_s:.0f} of {window_s:.0f} s"
    else:
        place = "waiting for the last requests"
    ended = [recording for recording in recordings if recording.end_s is not None]
    failed = sum(bool(recording.error) for recording in ended)
    tokens = sum(recording.tokens for recording in recordings)
    return (
        f"{place}: {len(recordings)} sent, {in_flight} running, {len(ended) - failed} done, "
        f"{failed} failed, {tokens} tokens"
    )


def as_text(config: dict[str, Any], summary: Summary, reasons: Sequence[str]) -> str:
    """The result as a person reads it; latencies in milliseconds."""
    workload = config["workload"]
    lines = [
        f"{summary.arrivals} requests in {summary.window_s:.1f} s at {config['url']} "
        f"({workload['model']}), {summary.succeeded} succeeded",
        f"  offered    {summary.offered_rate_per_s:8.2f} req/s"
        f"   completed {summary.completed_rate_per_s:.2f} req/s"
        f"   mean concurrency {summary.mean_concurrency:.2f}",
        f"  output     {summary.output_tokens_per_s:8.1f} tokens/s"
        f"   prompt {_mean(summary.prompt_tokens)} tokens ({summary.cached_tokens} cached in all)"
        f"   answer {_mean(summary.completion_tokens)} tokens",
        f"  {'ms':12}{'mean':>9}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}",
    ]
    lines += [
        f"  {name:12}" + "".join(f"{value * 1e3:9.2f}" for value in _columns(sample))
        for name, sample in (
            ("TTFT", summary.ttft_s),
            ("TTFT wire", summary.ttft_wire_s),
            ("TPOT", summary.tpot_s),
            ("ITL", summary.itl_s),
            ("stall", summary.stall_s),
            ("TT2T", summary.tt2t_s),
            ("E2E", summary.e2e_s),
            ("send lag", summary.send_lag_s),
        )
        if sample is not None
    ]
    if summary.attainment is not None:
        reached = summary.attainment
        lines.append(
            f"  limits met by {reached.met} of {reached.arrivals} = {reached.share:.1%} "
            f"[{reached.low:.1%}, {reached.high:.1%}], "
            f"goodput {reached.goodput_requests_per_s:.2f} req/s"
        )
    lines += [f"  failed: {count} x {error}" for error, count in summary.errors.items()]
    lines += [f"INVALID: {reason}" for reason in reasons] or ["Valid."]
    return "\n".join(lines)


def _columns(sample: Quantiles) -> tuple[float, ...]:
    return sample.mean, sample.p50, sample.p90, sample.p99, sample.maximum


def _mean(sample: Quantiles | None) -> str:
    return "-" if sample is None else f"{sample.mean:.1f}"
