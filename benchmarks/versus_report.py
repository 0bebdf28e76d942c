"""What two systems' figures say about each other: ratios, targets, a table for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.versus_load import Cell, Figures

Medians = Mapping[tuple[str, Cell], Figures]

# (ours, theirs): how many times their output tokens/s ours has to reach.
TARGETS: dict[tuple[str, str], float] = {
    ("baton-aggregated", "vllm-aggregated"): 1.2,
    ("baton-1p1d", "vllm-1p1d"): 1.5,
    ("baton-aggregated", "transformers-cb"): 2.0,
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours beside theirs in one cell. Every ratio is ours / theirs.

    `misses` names what falls short of the target: more tokens/s, and no latency worse. Empty where
    all is met; None where the pair has no target.
    """

    ours: str
    theirs: str
    cell: Cell
    target: float | None
    tokens_per_s: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    misses: tuple[str, ...] | None


def compare(
    medians: Medians, pairs: Sequence[tuple[str, str]], cells: Sequence[Cell]
) -> list[Comparison]:
    """All pairs in all cells that both were measured in."""
    found = []
    for ours, theirs in pairs:
        for cell in cells:
            mine, other = medians.get((ours, cell)), medians.get((theirs, cell))
            if mine is not None and other is not None:
                found.append(_compare(ours, theirs, cell, mine, other))
    return found


def _compare(ours: str, theirs: str, cell: Cell, mine: Figures, other: Figures) -> Comparison:
    target = TARGETS.get((ours, theirs))
    rate = mine.output_tokens_per_s / other.output_tokens_per_s
    latencies = {
        "ttft_p50": _ratio(mine.ttft_p50_s, other.ttft_p50_s),
        "ttft_p99": _ratio(mine.ttft_p99_s, other.ttft_p99_s),
        "itl_p50": _ratio(mine.itl_p50_s, other.itl_p50_s),
        "itl_p99": _ratio(mine.itl_p99_s, other.itl_p99_s),
    }
    misses: tuple[str, ...] | None = None
    if target is not None:
        short = ("tokens/s",) if rate < target else ()
        misses = short + tuple(name for name, ratio in latencies.items() if ratio > 1.0)
    return Comparison(ours, theirs, cell, target, rate, **latencies, misses=misses)


def _ratio(mine: float, other: float) -> float:
    if other > 0:
        return mine / other
    return 1.0 if mine == 0 else float("inf")


def default_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs that have targets; without any, the first system against each other one."""
    known = [pair for pair in TARGETS if set(pair) <= set(names)]
    return known or [(names[0], other) for other in names[1:]]


def figures_table(medians: Medians, names: Sequence[str], cells: Sequence[Cell]) -> str:
    """One row for each cell and system (Markdown); times in milliseconds."""
    rows = [
        "| prompt, at once | system | tokens/s | TTFT p50 / p99 | ITL p50 / p99 | TPOT p50 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        for name in names:
            one = medians.get((name, cell))
            if one is not None:
                rows.append(
                    f"| {cell.prompt_tokens}, {cell.concurrency} | {name}"
                    f" | {one.output_tokens_per_s:.0f}"
                    f" | {_ms(one.ttft_p50_s)} / {_ms(one.ttft_p99_s)}"
                    f" | {_ms(one.itl_p50_s)} / {_ms(one.itl_p99_s)} | {_ms(one.tpot_p50_s)} |"
                )
    return "\n".join(rows)


def ratios_table(comparisons: Sequence[Comparison]) -> str:
    """One row for each comparison (Markdown): ours / theirs, and the verdict."""
    rows = [
        "| ours / theirs | prompt, at once | tokens/s | TTFT p50, p99 | ITL p50, p99 | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in comparisons:
        wanted = "" if one.target is None else f" (≥ {one.target:g})"
        rows.append(
            f"| {one.ours} / {one.theirs} | {one.cell.prompt_tokens}, {one.cell.concurrency}"
            f" | {one.tokens_per_s:.2f}{wanted} | {one.ttft_p50:.2f}, {one.ttft_p99:.2f}"
            f" | {one.itl_p50:.2f}, {one.itl_p99:.2f} | {_verdict(one)} |"
        )
    return "\n".join(rows)


def _verdict(one: Comparison) -> str:
    if one.misses is None:
        return "no target"
    return "pass" if not one.misses else "FAIL: " + ", ".join(one.misses)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"
