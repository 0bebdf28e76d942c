"""Another rank of a worker, in a process of its own: memory, and kv_transfer.rank_server.

    python -m tests.support.rank_process CHANNEL_FD KV_FILE WORDS_FILE

The memory is that of the two files, so that the test sees it. Prints one line of JSON: where it
is here. Ends when the channel is closed.
"""

import ctypes
import json
import signal
import socket
import sys

import numpy as np

from kv_transfer.rank_server import run
from tests.support.rank_rigs import memory_of


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: even frozen, die with the test
    fd, *paths = sys.argv[1:]
    kv, words = (np.memmap(path, mode="r+") for path in paths)
    memory = memory_of(kv.ctypes.data, words.ctypes.data, kv.nbytes)
    print(json.dumps([memory.base_address, memory.words_address]), flush=True)
    run(socket.socket(fileno=int(fd)), memory, 1)


if __name__ == "__main__":
    main()
