"""What a run wrote down: samples, the tally of requests, idle points."""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tests.soak.client import Outcome
from tests.soak.mix import Plan
from tests.soak.processes import Usage

STATES = ("free", "cached", "owned", "leased", "reserved", "quarantined")
MAX_EXAMPLES = 50  # of failures


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker's own word: its ledger, and what it has."""

    blocks: Mapping[str, int]  # by state
    total: int
    requests: int
    transfers: int

    @property
    def idle(self) -> bool:
        """Nothing is there, and every block is free or cached."""
        held = self.requests + self.transfers
        return held == 0 and self.blocks["free"] + self.blocks["cached"] == self.total


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment."""

    elapsed_s: float
    idle: bool  # taken at an idle point
    usage: Usage
    worker: WorkerState | None  # of P and D
    running: int | None  # requests, of the router
    done: int  # requests that have ended so far
    failed: int


@dataclass(eq=False)
class Tally:
    """Requests by what they were and how they ended."""

    ended: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    failures: Counter[str] = field(default_factory=Counter[str])
    examples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    tokens: int = 0
    compared: int = 0  # answers found equal to what is known

    @property
    def done(self) -> int:
        """Requests that have ended, in whatever way."""
        return self.ended.total()

    def take(self, plan: Plan, outcome: Outcome) -> None:
        """Count a request."""
        self.ended[plan.kind, outcome.how] += 1
        self.tokens += outcome.tokens
        if outcome.how == "answered" and plan.reference is not None:
            self.compared += 1
        if outcome.how == "failed":
            request = asdict(plan)
            request["raw"] = plan.raw.decode(errors="replace")[:2000] if plan.raw else None
            self.fail(outcome.failure, request=request)

    def fail(self, failure: str, **more: Any) -> None:
        """Count a failure by its kind, the text before the colon, and keep some examples."""
        self.failures[failure.partition(":")[0]] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append({"failure": failure[:3000], **more})


@dataclass(eq=False)
class Record:
    """A whole run, from its first sample to its end."""

    samples: list[Sample] = field(default_factory=list[Sample])
    idle_points: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """When, and how long it took from the last answer until nothing was held; seconds."""
    tally: Tally = field(default_factory=Tally)
    workers: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """The last status of each worker."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """The router's counters at the end."""

    def of(self, process: str, *, idle: bool) -> list[Sample]:
        """A process's samples, all or those of idle points."""
        return [s for s in self.samples if s.usage.process == process and (s.idle or not idle)]

    @property
    def processes(self) -> list[str]:
        """Their names, in the order of their start."""
        return list(dict.fromkeys(sample.usage.process for sample in self.samples))


class SampleFile:
    """samples.csv: one row a process and moment, written as it comes; sizes in bytes."""

    def __init__(self, file: Path) -> None:
        self._usage = [one.name for one in fields(Usage)]
        states = [f"{state}_blocks" for state in STATES]
        head = ["elapsed_s", "idle", *self._usage, *states, "requests", "transfers", "running"]
        self._stream = file.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._stream)
        self._writer.writerow([*head, "done", "failed"])

    def write(self, samples: Iterable[Sample]) -> None:
        """Add rows; they are on disk afterwards."""
        for sample in samples:
            worker = sample.worker
            blocks = [worker.blocks[state] if worker else "" for state in STATES]
            held = [worker.requests, worker.transfers] if worker else ["", ""]
            running = "" if sample.running is None else sample.running
            row = [getattr(sample.usage, name) for name in self._usage]
            moment = [f"{sample.elapsed_s:.3f}", int(sample.idle)]
            counted = [sample.done, sample.failed]
            self._writer.writerow([*moment, *row, *blocks, *held, running, *counted])
        self._stream.flush()

    def close(self) -> None:
        """Nothing comes any more."""
        self._stream.close()
