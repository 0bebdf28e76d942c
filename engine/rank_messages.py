"""What rank 0 and a follower tell each other, over a socket pair.

A frame: its length and its kind, 4 bytes each, little-endian; then the content. Settings, reports
and errors are JSON; a step is one array of int64:

    sequences, tokens, packed, words, offloads, loads, copies, changed tables, blocks in those
    | query_lens | kv_lens | sequence ids | packed | words (block, word) | offloads | loads | copies
    | changed tables (place in the step, length) | their blocks

Block tables that are as in the step before are not sent again.
"""

import json
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from engine.arrays import Moves, StepArrays
from engine.attention.base import IntArray

_HEAD = struct.Struct("<II")
_COUNTS = 9


class Kind(IntEnum):
    """What a frame holds."""

    SETUP = 1  # to a follower: what to load
    LOADED = 2  # from it: it has its weights
    CONNECT = 3  # to it: all have
    READY = 4  # from it: it can compute; with its KvMemory
    FAILED = 5  # from it: it cannot; with the error
    STEP = 6  # to it


class Link:
    """One end. Each direction is used by one thread."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        """For select."""
        return self._end.fileno()

    def send(self, kind: Kind, content: bytes = b"") -> None:
        """Send one frame.

        Raises:
            OSError: the other end is gone, or takes nothing (with a time-out on the socket).
        """
        self._end.sendall(_HEAD.pack(len(content), kind) + content)

    def tell(self, kind: Kind, fields: dict[str, Any]) -> None:
        """Send one frame of JSON. Raises OSError as `send`."""
        self.send(kind, json.dumps(fields).encode())

    def receive(self) -> tuple[Kind, bytes]:
        """Wait for one frame.

        Raises:
            EOFError: the other end is gone.
        """
        size, kind = _HEAD.unpack(self._exactly(_HEAD.size))
        return Kind(kind), self._exactly(size)

    def close(self) -> None:
        """Idempotent. `receive` raises EOFError, at the other end and in a thread at this one."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)  # or nobody who waits for it would notice
        self._end.close()

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                got = self._end.recv_into(view)
            except ConnectionError:
                got = 0
            if not got:
                raise EOFError
            view = view[got:]
        return bytes(data)


@dataclass(frozen=True, slots=True, eq=False)
class StepMessage:
    """One step of a follower, in this order: words, moves, then the arrays if there are any."""

    words: tuple[tuple[int, int], ...]  # block, its generation from now on
    moves: Moves
    arrays: StepArrays | None


class StepEncoder:
    """Steps as frames, for followers that have got all of those before."""

    def __init__(self) -> None:
        self._sent: dict[int, IntArray] = {}  # the last step's tables, by sequence

    def encode(
        self,
        words: Sequence[tuple[int, int]],
        moves: Moves,
        arrays: StepArrays | None,
    ) -> bytes:
        """The content of a STEP frame."""
        lists = (words, moves.offloads, moves.loads, moves.copies)
        sizes = [len(items) for items in lists]
        pairs = [np.array(items, np.uint64).view(np.int64).reshape(-1) for items in lists]
        if arrays is None:
            counts = np.array([0, 0, 0, *sizes, 0, 0], np.int64)
            return np.concatenate([counts, *pairs]).tobytes()
        changed = [
            (place, table)
            for place, (sequence, table) in enumerate(
                zip(arrays.sequences, arrays.tables, strict=True)
            )
            if self._sent.get(sequence) is not table
        ]
        self._sent = dict(zip(arrays.sequences, arrays.tables, strict=True))
        places = [(place, len(table)) for place, table in changed]
        counts = np.array(
            [
                len(arrays.query_lens),
                arrays.num_tokens,
                len(arrays.packed),
                *sizes,
                len(changed),
                sum(length for _, length in places),
            ],
            np.int64,
        )
        return np.concatenate(
            [
                counts,
                arrays.query_lens,
                arrays.kv_lens,
                np.asarray(arrays.sequences, np.int64),
                arrays.packed,
                *pairs,
                np.array(places, np.int64).reshape(-1),
                *(table for _, table in changed),
            ]
        ).tobytes()


class StepDecoder:
    """The other side of a StepEncoder: it must be given every frame."""

    def __init__(self) -> None:
        self._tables: dict[int, IntArray] = {}

    def decode(self, content: bytes) -> StepMessage:
        """What a STEP frame holds."""
        data: IntArray = np.frombuffer(bytearray(content), np.int64)
        sizes = [int(size) for size in data[:_COUNTS]]
        count, tokens, packed, *lists, changed, blocks = sizes
        lengths = [count, count, count, packed, *(2 * size for size in lists), 2 * changed, blocks]
        ends = list(accumulate(lengths, initial=_COUNTS))
        lens, kv_lens, ids, packed_ids, bumped, *moved, places, table_blocks = (
            data[begin:end] for begin, end in pairwise(ends)
        )
        arrays = None
        if count:
            query_starts = np.zeros(count + 1, np.int64)
            np.cumsum(lens, out=query_starts[1:])
            sequences = ids.tolist()
            self._update(sequences, places.reshape(-1, 2).tolist(), table_blocks)
            tables = [self._tables[sequence] for sequence in sequences]
            arrays = StepArrays(query_starts, lens, kv_lens, sequences, tables, packed_ids, tokens)
        moves = Moves(*(_pairs(pairs) for pairs in moved))
        return StepMessage(_pairs(bumped.view(np.uint64)), moves, arrays)

    def _update(self, sequences: list[int], places: list[list[int]], blocks: IntArray) -> None:
        new: dict[int, IntArray] = {}
        begin = 0
        for place, length in places:
            new[sequences[place]] = blocks[begin : begin + length].copy()
            begin += length
        before = self._tables
        self._tables = {s: new[s] if s in new else before[s] for s in sequences}


def _pairs(flat: Any) -> tuple[tuple[int, int], ...]:
    return tuple((first, second) for first, second in flat.reshape(-1, 2).tolist())
