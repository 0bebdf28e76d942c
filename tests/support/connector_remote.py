"""The far side of a NIXL test: a process that exposes memory with a known pattern.

    python -m tests.support.connector_remote NAME NUM_BLOCKS BYTES_PER_BLOCK SEED TLS

Prints one JSON line, answers each line of stdin with it, and ends at the end of stdin.
"""

import base64
import ctypes
import json
import signal
import sys

import numpy as np
from numpy.typing import NDArray

from kv_transfer.layout import MemoryRegion
from kv_transfer.nixl import NixlConnector


def pattern(num_blocks: int, bytes_per_block: int, seed: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, num_blocks * bytes_per_block, dtype=np.uint8)


def word_values(num_blocks: int, seed: int) -> NDArray[np.uint64]:
    return np.random.default_rng(seed + 1).integers(0, 1 << 64, num_blocks, dtype=np.uint64)


def region(array: NDArray[np.uint8] | NDArray[np.uint64]) -> MemoryRegion:
    return MemoryRegion(array.ctypes.data, array.nbytes)


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: even frozen, die with the test
    name, num_blocks, bytes_per_block, seed, tls = sys.argv[1:]
    kv = pattern(int(num_blocks), int(bytes_per_block), int(seed))
    words = word_values(int(num_blocks), int(seed))
    connector = NixlConnector(name, {"TLS": tls} if tls else None)
    connector.register(region(kv), region(words))
    hello = {
        "metadata": base64.b64encode(connector.agent_metadata()).decode(),
        "kv_address": kv.ctypes.data,
        "words_address": words.ctypes.data,
    }
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        print(line, end="", flush=True)
    connector.close()


if __name__ == "__main__":
    main()
