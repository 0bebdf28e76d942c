"""What `baton serve` tells the driver process, and what the driver answers.

The plan is a file in the cluster's private folder (it holds the cluster key); answers are
JSON lines on a pipe.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from cluster.resolve import ResolvedCluster

_PLAN = "plan.json"
_ADAPTER = TypeAdapter(ResolvedCluster)


def write_plan(folder: Path, cluster: ResolvedCluster) -> None:
    """Leave the plan where only this user can read it."""
    descriptor = os.open(folder / _PLAN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(_ADAPTER.dump_json(cluster))


def read_plan(folder: Path) -> ResolvedCluster:
    """The plan in `folder`."""
    return _ADAPTER.validate_json((folder / _PLAN).read_bytes())


@dataclass(frozen=True, slots=True)
class Report:
    """One line from the driver. `kind`: stage, ready or error; `at` is time.monotonic()."""

    kind: str
    text: str
    at: float

    def encode(self) -> bytes:
        """One line."""
        return json.dumps([self.kind, self.text, self.at]).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> "Report":
        """The inverse of `encode`."""
        kind, text, at = json.loads(line)
        return cls(kind, text, at)

    @classmethod
    def now(cls, kind: str, text: str) -> "Report":
        """A report of this moment."""
        return cls(kind, text, time.monotonic())
