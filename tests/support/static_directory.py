"""A worker directory that never changes."""

from collections.abc import AsyncIterator, Iterable

from contracts.worker import WorkerAddress


class StaticDirectory:
    """A fixed list of addresses."""

    def __init__(self, addresses: Iterable[WorkerAddress]) -> None:
        self._addresses = tuple(addresses)

    async def watch(self) -> AsyncIterator[tuple[WorkerAddress, ...]]:
        """Yield the list once."""
        yield self._addresses
