"""The free blocks, kept as runs of neighbours, so that a prompt gets few runs (few descriptors)."""

from collections.abc import Iterator


class FreeRuns:
    """Disjoint, non-touching runs [start, start + length) of free blocks."""

    def __init__(self, num_blocks: int) -> None:
        self._length_at: dict[int, int] = {}  # run start -> length
        self._start_of_end: dict[int, int] = {}  # first block after a run -> run start
        self._total = 0
        if num_blocks:
            self._add_run(0, num_blocks)
            self._total = num_blocks

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        """The free blocks, in no order."""
        for start, length in self._length_at.items():
            yield from range(start, start + length)

    def _add_run(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_of_end[start + length] = start

    def _remove_run(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_of_end[start + length]
        return length

    def add(self, block_id: int) -> None:
        """Return one block; merges with its neighbours."""
        start, length = block_id, 1
        before = self._start_of_end.get(block_id)
        if before is not None:
            start = before
            length += self._remove_run(before)
        if block_id + 1 in self._length_at:
            length += self._remove_run(block_id + 1)
        self._add_run(start, length)
        self._total += 1

    def _take_from(self, start: int, count: int) -> list[int]:
        length = self._remove_run(start)
        if length > count:
            self._add_run(start + count, length - count)
        self._total -= count
        return list(range(start, start + count))

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Take `count` blocks in as few runs as is easy: `after + 1` on, else the smallest run
        that holds all, else the largest runs. The caller has checked that there are enough.
        """
        taken: list[int] = []
        if after is not None and after + 1 in self._length_at:
            start = after + 1
            taken += self._take_from(start, min(count, self._length_at[start]))
        while len(taken) < count:
            need = count - len(taken)
            fitting = [(length, s) for s, length in self._length_at.items() if length >= need]
            if fitting:
                taken += self._take_from(min(fitting)[1], need)
            else:
                length, start = max((length, -s) for s, length in self._length_at.items())
                taken += self._take_from(-start, length)
        return taken
