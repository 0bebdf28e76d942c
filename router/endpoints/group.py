"""Several generations that make one answer: the prompts of one completion request."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from contracts.errors import ServingError
from router.job import Usage
from router.outbox import Outbox
from router.pieces import Piece
from router.request import Generation


class _Part(Outbox):
    """One generation's way into the common outbox; its choices get numbers of their own."""

    def __init__(self, group: "GenerationGroup", index: int) -> None:
        super().__init__(None)
        self._group = group
        self._index = index

    def put(self, piece: Piece) -> None:
        self._group.put(self._index, piece)

    def close(self, error: ServingError | None = None) -> None:
        self._group.close_part(self._index, error)


class GenerationGroup:
    """A PieceSource. All parts are started together; the first failure ends them all.

    Args:
        make: makes the generation of part i, which reports to the given outbox.
        num_choices: of each part, in order.
        outbox: where all pieces go.
    """

    def __init__(
        self,
        make: Callable[[int, Outbox], Generation],
        num_choices: Sequence[int],
        outbox: Outbox,
    ) -> None:
        self.outbox = outbox
        self._offsets = [sum(num_choices[:i]) for i in range(len(num_choices))]
        self._emitted = [0] * len(num_choices)
        self._open = set(range(len(num_choices)))
        self.parts = [make(i, _Part(self, i)) for i in range(len(num_choices))]

    @property
    def usage(self) -> Usage:
        """Counts of all parts so far."""
        usages = [part.usage for part in self.parts]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
        )

    @property
    def semantic_hash(self) -> str | None:
        """Of the model that answered."""
        return self.parts[0].semantic_hash

    def start(self) -> None:
        """Begin with all parts."""
        for part in self.parts:
            part.start()

    def stop(self) -> None:
        """Release everything now; the outbox ends. Idempotent."""
        self.outbox.close()
        for part in self.parts:
            part.stop()

    async def aclose(self) -> None:
        """`stop`, then wait until all parts are done."""
        self.stop()
        await asyncio.gather(*(part.aclose() for part in self.parts))

    # Called by the parts' outboxes

    def put(self, index: int, piece: Piece) -> None:
        """A piece of part `index`; raises SlowReader if the outbox is full."""
        self._emitted[index] = piece.completion_tokens
        self.outbox.put(
            replace(
                piece,
                choice=self._offsets[index] + piece.choice,
                completion_tokens=sum(self._emitted),
            )
        )

    def close_part(self, index: int, error: ServingError | None) -> None:
        """Part `index` is over."""
        self._open.discard(index)
        if error is not None:
            self.outbox.close(error)
            for other in self._open.copy():
                self.parts[other].stop()
        elif not self._open:
            self.outbox.close()
