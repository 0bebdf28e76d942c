"""The process in which grammars are compiled first, so that a hostile one can be killed.

It reads frames from standard input and answers each on standard output; it ends with its parent.
A frame: length of a JSON head and of a body, 4 bytes each, little-endian; then both.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from contracts.errors import InvalidRequest
from contracts.sampling import Grammar, GrammarKind

HEAD = struct.Struct("<II")
PR_SET_PDEATHSIG = 1


def write_frame(stream: BinaryIO, head: dict[str, Any], body: bytes = b"") -> None:
    """Send one frame."""
    text = json.dumps(head).encode()
    stream.write(HEAD.pack(len(text), len(body)) + text)
    stream.write(body)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """Receive one frame.

    Raises:
        EOFError: the other side is gone.
    """
    head_size, body_size = HEAD.unpack(_exactly(stream, HEAD.size))
    head: dict[str, Any] = json.loads(_exactly(stream, head_size))
    return head, _exactly(stream, body_size)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def grammar_to_json(grammar: Grammar) -> dict[str, Any]:
    """What a child needs of a grammar."""
    return asdict(grammar)


def grammar_from_json(fields: dict[str, Any]) -> Grammar:
    """The grammar that `grammar_to_json` wrote."""
    tuples = {name: tuple(fields[name]) for name in ("start_after", "end_token_ids")}
    return Grammar(**{**fields, **tuples, "kind": GrammarKind(fields["kind"])})


def main() -> None:
    """Serve the parent until it closes the pipe."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between
    setup, _ = read_frame(requests)
    if os.getppid() != setup["parent"]:
        return
    from engine.grammar_backends import FIRST, Backends

    backends = Backends(Path(setup["path"]), setup["vocab_size"], setup["ends"])
    with suppress(InvalidRequest):  # each request will tell
        backends.get(FIRST)
    _limit_memory(setup["memory_limit_bytes"])
    write_frame(answers, {"ready": True})
    while True:
        try:
            fields, _ = read_frame(requests)
        except EOFError:
            return
        try:
            name, source = backends.compile(grammar_from_json(fields))
            write_frame(answers, {"backend": name}, source)
        except InvalidRequest as error:
            write_frame(answers, {"refused": str(error)})
        except MemoryError:
            write_frame(answers, {"refused": "compiling the grammar takes too much memory"})
            return


def _limit_memory(limit_bytes: int) -> None:
    """A last resort; the parent looks at the memory really used, and acts before."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        total = pages * resource.getpagesize() + 4 * limit_bytes
        resource.setrlimit(resource.RLIMIT_AS, (total, total))


if __name__ == "__main__":
    main()
