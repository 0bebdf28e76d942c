"""Where the addresses of the workers come from."""

from collections.abc import AsyncIterator, Iterable
from typing import Protocol

from contracts.worker import WorkerAddress


class WorkerDirectory(Protocol):
    """A source of worker addresses: a fixed list, or the cluster's registry."""

    def watch(self) -> AsyncIterator[tuple[WorkerAddress, ...]]:
        """Yield the whole current list, and again on each change. May end: the last one stays."""
        ...


class StaticDirectory:
    """A fixed list of addresses."""

    def __init__(self, addresses: Iterable[WorkerAddress]) -> None:
        self._addresses = tuple(addresses)

    async def watch(self) -> AsyncIterator[tuple[WorkerAddress, ...]]:
        """Yield the list once."""
        yield self._addresses
