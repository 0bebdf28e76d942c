"""A process that has imported everything and forks: a worker is there in half a second.

Who connects to its socket and sends (function, arguments) is connected to a new process that runs
that function; the connection is its control channel. The zygote itself starts no thread, no gRPC
and no NIXL agent, and ends with the process that started it; so do the processes it forked.
"""

import ctypes
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.campaign.channel import read_frame, write_frame

_PR_SET_PDEATHSIG = 1
_PRELOAD = (
    "torch",
    "transformers",
    "transformers.models.qwen3.modeling_qwen3",
    "uvloop",
    "uvicorn",
    "xgrammar",
    "nixl._api",
    "prefill_worker.worker",
    "decode_worker.worker",
    "engine.grammar_backends",
    "engine.grammar_xgrammar",
    "router.app",
    "rpc.session_client",
    "cluster.plain",
    "tests.faults.campaign.child",
    "tests.faults.campaign.runner",
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NIXL_LOG_LEVEL": "FATAL",
    "UCX_LOG_LEVEL": "fatal",
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
}


def die_with_parent() -> None:
    """Linux only; elsewhere the closed channel ends a process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def fork(path: str, function: str, *arguments: Any) -> tuple[int, socket.socket]:
    """Run `module:function(sock, *arguments)` in a new process; its pid and its channel."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    write_frame(sock, (function, arguments))
    pid: int = read_frame(sock)
    return pid, sock


def start(folder: Path) -> tuple["subprocess.Popen[bytes]", str]:
    """Start a zygote and wait until it is ready; the process and its socket's path."""
    path = str(folder / "zygote.sock")
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, path, str(os.getpid())],
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=(folder / "zygote.log").open("wb"),
    )
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        process.wait()
        raise RuntimeError((folder / "zygote.log").read_text()[-4000:])
    return process, path


# Not -m: the name __main__ must not be what the forked processes pickle by.
_COMMAND = "from tests.faults.campaign.zygote import main; main()"


def main() -> None:
    """Import, listen, fork."""
    die_with_parent()
    path, parent = sys.argv[1], int(sys.argv[2])
    if os.getppid() != parent:
        return
    for name in _PRELOAD:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    Path(path).unlink(missing_ok=True)  # of an earlier campaign in this folder
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody becomes a zombie
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it decides
    gc.collect()
    gc.freeze()
    os.write(1, b"ready\n")
    while True:
        sock, _ = listener.accept()
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            _child(sock, listener, zygote)
        sock.close()


def _child(sock: socket.socket, listener: socket.socket, zygote: int) -> None:
    code = 1
    try:
        die_with_parent()
        if os.getppid() == zygote:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            function, arguments = read_frame(sock)
            write_frame(sock, os.getpid())
            module, _, name = function.partition(":")
            run: Callable[..., None] = getattr(importlib.import_module(module), name)
            run(sock, *arguments)
            code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
