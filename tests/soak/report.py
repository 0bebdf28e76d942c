"""From a record to a verdict, files and a short table."""

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.soak.plot import draw
from tests.soak.record import Record
from tests.soak.verdict import Finding, judge_count, judge_memory

# Quantities, and how far apart they may be. An asyncio loop's pool has at most that many threads.
COUNTS = {"processes": 0, "fds": 0, "threads": min(32, (os.cpu_count() or 1) + 4), "sockets": 0}
MEMORY = ("rss", "uss")
_MIB = 1 << 20


def judge(record: Record) -> list[Finding]:
    """Every quantity of every process. Blocks are judged where they are read: at idle points."""
    findings = []
    for process in record.processes:
        idle = record.of(process, idle=True)
        if not any(sample.usage.processes for sample in idle):
            continue
        for name, room in COUNTS.items():
            values = [int(getattr(sample.usage, name)) for sample in idle]
            findings.append(judge_count(process, name, values, room))
        for name in MEMORY:
            points = [(s.elapsed_s, float(getattr(s.usage, name))) for s in idle]
            findings.append(judge_memory(process, name, points))
    return findings


def passed(record: Record, findings: list[Finding]) -> bool:
    """Nothing failed and nothing grows."""
    return not record.tally.failures and all(finding.flat for finding in findings)


def summary(
    record: Record, findings: list[Finding], settings: Mapping[str, Any], elapsed_s: float
) -> dict[str, Any]:
    """All of it as JSON."""
    tally = record.tally
    by_kind: dict[str, dict[str, int]] = {}
    for (kind, how), count in sorted(tally.ended.items()):
        by_kind.setdefault(kind, {})[how] = count
    endings: Counter[str] = Counter()
    for (_, how), count in tally.ended.items():
        endings[how] += count
    waits = [waited for _, waited in record.idle_points]
    return {
        "passed": passed(record, findings),
        "settings": dict(settings),
        "machine": {"python": platform.python_version(), "system": platform.platform()},
        "elapsed_s": round(elapsed_s, 1),
        "requests": tally.done,
        "requests_by_ending": dict(endings),
        "requests_by_kind": by_kind,
        "answers_compared_and_equal": tally.compared,
        "output_tokens_checked": tally.tokens,
        "failures": dict(tally.failures),
        "idle_points": len(waits),
        "longest_wait_for_idle_s": round(max(waits, default=0.0), 2),
        "findings": [
            {name: getattr(finding, name) for name in Finding.__slots__} for finding in findings
        ],
        "workers": record.workers,
        "router": record.metrics,
        "examples_of_failures": tally.examples,
    }


def write(
    record: Record, findings: list[Finding], settings: Mapping[str, Any], elapsed_s: float, to: Path
) -> None:
    """summary.json, soak.png and soak.svg."""
    text = json.dumps(summary(record, findings, settings, elapsed_s), indent=2, default=repr)
    (to / "summary.json").write_text(text + "\n", encoding="utf-8")
    draw(record, to)


def table(record: Record, findings: list[Finding], elapsed_s: float) -> str:
    """What a person reads at the end."""
    tally = record.tally
    left = sum(count for (_, how), count in tally.ended.items() if how == "left")
    waits = [waited for _, waited in record.idle_points]
    counted = {
        name: record.metrics.get(f"baton:{name}_total", 0) for name in ("retries", "replays")
    }
    lines = [
        f"{tally.done} requests in {elapsed_s / 60:.1f} min, {left} clients left early,"
        f" {tally.compared} answers compared and equal",
        f"{len(waits)} idle points, each reached within {max(waits, default=0.0):.2f} s;"
        f" {counted['retries']:.0f} retries, {counted['replays']:.0f} replays",
        f"{'process':<18}{'RSS MiB':>16}{'MiB/h':>8}{'fds':>11}{'threads':>11}{'sockets':>11}",
    ]
    found = {(finding.process, finding.quantity): finding for finding in findings}
    for process in dict.fromkeys(finding.process for finding in findings):
        rss = found[process, "rss"]
        slope = "-" if rss.slope_mib_h is None else f"{rss.slope_mib_h:.1f}"
        cells = [f"{rss.first / _MIB:.0f} .. {rss.last / _MIB:.0f}".rjust(16), slope.rjust(8)]
        for name in ("fds", "threads", "sockets"):
            one = found[process, name]
            cells.append(f"{one.first:.0f} .. {one.last:.0f}".rjust(11))
        lines.append(f"{process:<18}{''.join(cells)}")
    for finding in findings:
        if not finding.flat:
            lines.append(f"NOT FLAT: {finding.process} {finding.quantity}: {finding.detail}")
        elif finding.detail and finding.quantity == "rss":
            lines.append(f"note: {finding.process} {finding.quantity}: {finding.detail}")
    for kind, count in sorted(tally.failures.items()):
        lines.append(f"FAILED: {count} x {kind}")
    lines.append("passed" if passed(record, findings) else "NOT passed")
    return "\n".join(lines)
