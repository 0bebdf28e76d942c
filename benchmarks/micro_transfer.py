"""KV transfer by size, out of a second process: `python -m benchmarks.micro_transfer NAME BYTES`.

That command is the second process. It registers memory with NIXL, prints one line of JSON, and
ends at the end of its stdin. This one reads from it through a TransferThread, as a D does.
"""

import asyncio
import base64
import importlib.util
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.micro_clock import Effort
from benchmarks.micro_machine import Machine
from contracts.errors import TransferFailed
from kv_transfer.layout import MAX_SLICE_BYTES, MemoryRegion, Region

SIZES = tuple(1 << power for power in (14, 16, 18, 20, 22, 24, 26))  # 16 KiB to 64 MiB
_WORDS = 512
_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class TransferFigures:
    """One read of `num_bytes`, in one run of memory, host to host."""

    num_bytes: int
    us: float
    gb_s: float
    of_copy: float  # what it reads and writes, of what a copy does


class NoTransfer(Exception):
    """Transfers cannot be measured here; the text says why."""


def transfer_figures(
    sizes: Sequence[int], machine: Machine, effort: Effort
) -> list[TransferFigures]:
    """Measure reads of each size.

    Raises:
        NoTransfer: without NIXL, or if it fails.
    """
    if importlib.util.find_spec("nixl") is None:
        raise NoTransfer("nixl is not installed")
    try:
        with _exporter(max(sizes)) as hello:
            return asyncio.run(_measure(sizes, hello, machine, effort))
    except TransferFailed as error:
        raise NoTransfer(f"NIXL failed: {error}") from error


async def _measure(
    sizes: Sequence[int], hello: dict[str, str], machine: Machine, effort: Effort
) -> list[TransferFigures]:
    from kv_transfer import reading
    from kv_transfer.connector import Read
    from kv_transfer.nixl import NixlConnector
    from kv_transfer.transfer_thread import TransferThread

    kv = np.ones(max(sizes), dtype=np.uint8)
    words = np.zeros(_WORDS, dtype=np.uint64)
    thread = TransferThread(lambda: NixlConnector(f"micro-{secrets.token_hex(6)}"))
    await thread.start()
    try:
        await thread.register(
            MemoryRegion(kv.ctypes.data, kv.nbytes), MemoryRegion(words.ctypes.data, words.nbytes)
        )
        peer = await thread.add_peer(base64.b64decode(hello["metadata"]))
        remote = MemoryRegion(int(hello["address"]), max(sizes))
        figures = []
        for size in sizes:
            pieces = [
                Region(first, first, min(MAX_SLICE_BYTES, size - first))
                for first in range(0, size, MAX_SLICE_BYTES)
            ]
            lane = reading.Lane(thread, [Read(peer, "kv", [piece], remote) for piece in pieces])
            found: list[float] = []
            began = time.perf_counter()
            while effort.goes_on(len(found) - 1, began):  # one to connect and touch
                start = time.perf_counter()
                deadline = time.monotonic() + _LIMIT_S
                await reading.read([lane], deadline=deadline)
                found.append(time.perf_counter() - start)
            seconds = statistics.median(found[1:])
            gb_s = size / seconds / 1e9
            figures.append(TransferFigures(size, seconds * 1e6, gb_s, 2 * gb_s / machine.copy_gb_s))
        return figures
    finally:
        await thread.close()


@contextmanager
def _exporter(num_bytes: int) -> Iterator[dict[str, str]]:
    """The second process, and what it says of itself."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, f"micro-{secrets.token_hex(6)}", str(num_bytes)],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise NoTransfer("the second process did not start")
        hello: dict[str, str] = json.loads(line)
        yield hello
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def export(name: str, num_bytes: int) -> None:
    """Be the second process."""
    from kv_transfer.nixl import NixlConnector

    kv = np.ones(num_bytes, dtype=np.uint8)
    words = np.zeros(_WORDS, dtype=np.uint64)
    connector = NixlConnector(name)
    connector.register(
        MemoryRegion(kv.ctypes.data, kv.nbytes), MemoryRegion(words.ctypes.data, words.nbytes)
    )
    metadata = base64.b64encode(connector.agent_metadata()).decode()
    print(json.dumps({"metadata": metadata, "address": str(kv.ctypes.data)}), flush=True)
    sys.stdin.read()
    connector.close()


if __name__ == "__main__":
    export(sys.argv[1], int(sys.argv[2]))
