"""The same small world for each connector: an own side, and remotes with known memory."""

import base64
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kv_transfer.connector import KvConnector, ReadHandle, ReadState
from kv_transfer.layout import MemoryRegion
from kv_transfer.memory import MemoryConnector, MemoryHub
from kv_transfer.nixl import NixlConnector
from tests.support.connector_remote import pattern, region, word_values

NUM_BLOCKS = 64
BYTES_PER_BLOCK = 4096
TIME_LIMIT_S = 15.0
_ROOT = Path(__file__).resolve().parents[2]
_serial = itertools.count()


def unique_name(prefix: str) -> str:
    """An agent name that nobody else on the machine has."""
    return f"{prefix}-{os.getpid()}-{next(_serial)}"


@dataclass(frozen=True)
class Remote:
    """A peer: what its Hello would tell, what its memory holds, and ways to do it harm."""

    metadata: bytes
    kv: MemoryRegion
    words: MemoryRegion
    kv_bytes: NDArray[np.uint8]
    word_values: NDArray[np.uint64]
    kill: Callable[[], None]  # at once; returns when it is dead
    hold: Callable[[], None]  # reads posted from now on stay pending
    resume: Callable[[], None]
    close: Callable[[], None]


class Own:
    """The reading side: a connector with KV memory and a landing table for words."""

    def __init__(self, connector: KvConnector) -> None:
        self.connector = connector
        self.kv = np.zeros(NUM_BLOCKS * BYTES_PER_BLOCK, dtype=np.uint8)
        self.words = np.zeros(NUM_BLOCKS, dtype=np.uint64)
        connector.register(region(self.kv), region(self.words))

    def block(self, block: int) -> NDArray[np.uint8]:
        return self.kv[block * BYTES_PER_BLOCK : (block + 1) * BYTES_PER_BLOCK]

    def finish(self, *handles: ReadHandle) -> list[ReadState]:
        """Poll to the end, within the time limit."""
        deadline = time.monotonic() + TIME_LIMIT_S
        while True:
            states = [self.connector.poll(handle) for handle in handles]
            if all(state.terminal for state in states):
                return states
            assert time.monotonic() < deadline, states
            time.sleep(1e-4)


class World(Protocol):
    """One kind of connector."""

    def make_connector(self) -> KvConnector: ...
    def remote(self, seed: int = 1) -> Remote: ...


class MemoryWorld:
    """MemoryConnectors on one hub."""

    def __init__(self) -> None:
        self.hub = MemoryHub()

    def make_connector(self) -> KvConnector:
        return MemoryConnector(unique_name("own"), self.hub)

    def remote(self, seed: int = 1) -> Remote:
        kv, words = pattern(NUM_BLOCKS, BYTES_PER_BLOCK, seed), word_values(NUM_BLOCKS, seed)
        connector = MemoryConnector(unique_name("remote"), self.hub)
        connector.register(region(kv), region(words))
        return Remote(
            metadata=connector.agent_metadata(),
            kv=region(kv),
            words=region(words),
            kv_bytes=kv,
            word_values=words,
            kill=lambda: self.hub.disconnect(connector.name),
            hold=self.hub.hold,
            resume=self.hub.land,
            close=connector.close,
        )


class NixlWorld:
    """NixlConnectors; each remote is a process. Only over TCP can a frozen one hold reads."""

    def __init__(self, tls: str = "") -> None:
        self.tls = tls

    def make_connector(self) -> KvConnector:
        return NixlConnector(unique_name("own"), {"TLS": self.tls} if self.tls else None)

    def remote(self, seed: int = 1) -> Remote:
        shape = [str(NUM_BLOCKS), str(BYTES_PER_BLOCK), str(seed), self.tls]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.connector_remote", unique_name("remote"), *shape],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        hello = json.loads(process.stdout.readline())  # nothing but this line: NIXL is quiet

        def kill() -> None:
            process.kill()
            process.wait(TIME_LIMIT_S)

        def close() -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.send_signal(signal.SIGCONT)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(TIME_LIMIT_S)
            finally:
                kill()
                process.stdout.close()

        kv = pattern(NUM_BLOCKS, BYTES_PER_BLOCK, seed)
        words = word_values(NUM_BLOCKS, seed)
        return Remote(
            metadata=base64.b64decode(hello["metadata"]),
            kv=MemoryRegion(hello["kv_address"], kv.nbytes),
            words=MemoryRegion(hello["words_address"], words.nbytes),
            kv_bytes=kv,
            word_values=words,
            kill=kill,
            hold=lambda: _freeze(process.pid),
            resume=lambda: process.send_signal(signal.SIGCONT),
            close=close,
        )


def _freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + TIME_LIMIT_S
    stat = Path(f"/proc/{pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(1e-3)
