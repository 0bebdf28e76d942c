"""Where the addresses of the workers come from."""

from collections.abc import AsyncIterator
from typing import Protocol

from contracts.worker import WorkerAddress


class WorkerDirectory(Protocol):
    """A source of worker addresses: a fixed list, or the cluster's registry."""

    def watch(self) -> AsyncIterator[tuple[WorkerAddress, ...]]:
        """Yield the whole current list, and again on each change. May end: the last one stays."""
        ...
