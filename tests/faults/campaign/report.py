"""What a campaign came to: as JSON, and as tables for docs/reliability.md."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.campaign.run import Outcome


@dataclass
class Row:
    """All runs of one fault."""

    runs: int = 0
    struck: int = 0
    failed: int = 0
    seconds: float = 0.0
    results: Counter[str] = field(default_factory=Counter[str])
    served: Counter[str] = field(default_factory=Counter[str])


@dataclass
class Report:
    """Everything. `began` and `ended` are Unix seconds."""

    seed: int
    clusters: int
    machine: str
    seconds: float = 0.0
    rows: dict[str, Row] = field(default_factory=dict[str, Row])
    releases: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    failures: list[str] = field(default_factory=list[str])

    def add(self, outcome: Outcome) -> None:
        """Count a run in."""
        row = self.rows.setdefault(outcome.fault, Row())
        row.runs += 1
        row.struck += outcome.struck
        row.failed += bool(outcome.failures)
        row.seconds += outcome.seconds
        row.results += outcome.results
        row.served += outcome.served
        for release in outcome.releases:
            self.releases.setdefault(release.kind, []).append(release.seconds)
        for failure in outcome.failures:
            self.failures.append(
                f"seed {self.seed} index {outcome.index} ({outcome.fault}): {failure}"
            )

    @property
    def runs(self) -> int:
        """How many were made."""
        return sum(row.runs for row in self.rows.values())

    @property
    def failed(self) -> int:
        """How many runs failed."""
        return sum(row.failed for row in self.rows.values())

    def as_json(self) -> str:
        """For machines."""
        rows: dict[str, Any] = {
            name: {
                "runs": row.runs,
                "struck": row.struck,
                "failed": row.failed,
                "seconds": round(row.seconds, 1),
                "results": dict(row.results),
                "served": dict(row.served),
            }
            for name, row in sorted(self.rows.items())
        }
        found = {
            "seed": self.seed,
            "clusters": self.clusters,
            "machine": self.machine,
            "seconds": round(self.seconds, 1),
            "runs": self.runs,
            "failures": self.failures,
            "faults": rows,
            "releases": {
                kind: {"count": len(values), **percentiles(values)}
                for kind, values in sorted(self.releases.items())
            },
        }
        return json.dumps(found, indent=1) + "\n"

    def as_markdown(self) -> str:
        """For people."""
        requests = sum((row.results for row in self.rows.values()), Counter[str]())
        served = sum((row.served for row in self.rows.values()), Counter[str]())
        lines = [
            f"{self.runs:,} runs of seed {self.seed} on {self.clusters} clusters in "
            f"{self.seconds / 60:.1f} min ({self.machine}): {self.failed} failed.",
            "",
            f"Requests: {_counts(requests)}. Served: {_counts(served)}.",
            "",
            *_table(
                ("fault", "runs", "at its moment", "failed", "requests", "mean s"),
                [
                    (
                        name,
                        row.runs,
                        row.struck,
                        row.failed,
                        _counts(row.results),
                        f"{row.seconds / row.runs:.2f}",
                    )
                    for name, row in sorted(self.rows.items())
                ],
            ),
            "",
            *_table(
                ("released after", "times", "p50 ms", "p99 ms", "max ms"),
                [
                    (kind, len(values), *(f"{1000 * v:.0f}" for v in percentiles(values).values()))
                    for kind, values in sorted(self.releases.items())
                ],
            ),
        ]
        return "\n".join(lines) + "\n"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Nearest-rank p50 and p99, and the greatest."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "p50": ordered[round(0.50 * last)],
        "p99": ordered[round(0.99 * last)],
        "max": ordered[last],
    }


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common()) or "none"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
