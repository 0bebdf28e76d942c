"""Rank 0's side of a worker with several ranks: starts the others, leads them, sees them die."""

import fcntl
import json
import logging
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from contracts import errors
from contracts.errors import EngineFailure
from contracts.ids import Incarnation
from contracts.memory import KvMemory
from contracts.worker import WorkerConfig
from engine.arrays import Moves, StepArrays
from engine.generations import GenerationWords
from engine.rank_group import BUILD_S, STEP_S, RankGroup
from engine.rank_messages import Kind, Link, StepEncoder

log = logging.getLogger(__name__)

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]);"
    " from engine.rank_main import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)
_END_S = 2.0
_FOLDERS = "baton-ranks-"
_REASON_S = 1.0  # for a follower to say why


class Followers:
    """Ranks 1 and up of one worker, each a process.

    `start` and `close` belong to the worker's event loop, `send` to the engine's thread, the rest
    to the thread that builds. Children die with the thread that started them, so that must be one
    that lives as long as the worker.

    Args:
        config: the worker's, with `tensor_parallel_size` > 1.
        incarnation: likewise.
        service: "module:function" to run in a thread of each follower (see
            engine.rank_main.RankService); `service_ends` are its sockets' other ends.
    """

    def __init__(self, config: WorkerConfig, incarnation: Incarnation, service: str = "") -> None:
        self._config = replace(config, cluster_key="")
        self._incarnation = incarnation
        self._service = service
        _remove_stale_folders()
        self._folder = tempfile.TemporaryDirectory(prefix=_FOLDERS)
        self._folder_lock = os.open(self._folder.name, os.O_RDONLY)
        fcntl.flock(self._folder_lock, fcntl.LOCK_SH)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[Link] = []
        self._encoder = StepEncoder()
        self._words: GenerationWords | None = None
        self._watcher: threading.Thread | None = None
        self._closing = False
        self._wake, self._woken = socket.socketpair()
        self.service_ends: list[socket.socket] = []
        self.memories: tuple[KvMemory, ...] = ()
        size = config.tensor_parallel_size
        self.group = RankGroup(0, size, Path(self._folder.name), self._meet)

    def start(self) -> None:
        """Start the processes; they load their shares at once."""
        for rank in range(1, self._config.tensor_parallel_size):
            mine, theirs = socket.socketpair()
            service, service_end = socket.socketpair()
            mine.settimeout(STEP_S)
            path = json.dumps([entry or os.getcwd() for entry in sys.path])
            with theirs, service_end:
                fds = (theirs.fileno(), service_end.fileno())
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", _START, path, *map(str, fds)],
                        stdin=subprocess.DEVNULL,
                        stdout=2,  # the worker's own standard output is for its ready line
                        pass_fds=fds,
                    )
                )
            self._links.append(Link(mine))
            self.service_ends.append(service)
            setup = {
                "rank": rank,
                "parent": os.getpid(),
                "folder": self._folder.name,
                "incarnation": self._incarnation,
                "service": self._service,
                "log_level": max(logging.WARNING, logging.getLogger().getEffectiveLevel()),
                "config": asdict(self._config),
            }
            with suppress(OSError):  # dead already; `_meet` will tell
                self._links[-1].tell(Kind.SETUP, setup)

    def finish(self, words: GenerationWords) -> None:
        """Wait until all can compute; from now on `words` are theirs, too.

        Raises:
            ServingError: one cannot; as it says itself.
        """
        found = [self._expect(rank, Kind.READY) for rank in range(1, len(self._links) + 1)]
        self.memories = tuple(KvMemory(**json.loads(content)) for content in found)
        words.record()
        self._words = words

    def reason(self, error: Exception) -> Exception:
        """Why building failed: what a follower says of itself, if one does, else `error`."""
        if not isinstance(error, EngineFailure):
            return error  # rank 0's own
        for rank, link in enumerate(self._links, 1):
            while _first_readable([link], _REASON_S) is not None:
                try:
                    self._next(rank)
                except errors.ServingError as cause:
                    if "has ended" not in str(cause):
                        return cause
                    break
        return error

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        """From now on tell (once, in a thread) when a follower dies."""

        def wait() -> None:
            ready = _first_readable([*self._links, self._woken])
            if not self._closing and ready is not None:
                on_failure(self._ended(ready + 1))

        self._watcher = threading.Thread(target=wait, name="baton-ranks", daemon=True)
        self._watcher.start()

    def send(self, moves: Moves, arrays: StepArrays | None) -> None:
        """See engine.runner.StepFollowers.

        Raises:
            EngineFailure: a follower is dead or stuck.
        """
        words = () if self._words is None else self._words.take_bumped()
        content = self._encoder.encode(words, moves, arrays)
        for rank, link in enumerate(self._links, 1):
            try:
                link.send(Kind.STEP, content)
            except OSError as error:
                raise EngineFailure(f"rank {rank} of this worker takes no step: {error}") from error
        if arrays is None:
            self.group.barrier()

    def close(self) -> None:
        """End the processes. Idempotent; accepts what never started."""
        self._closing = True
        with suppress(OSError):
            self._wake.send(b".")
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        self.group.close()
        for link in self._links:
            link.close()
        # One that still loads hears nothing, and has nothing to end.
        deadline = time.monotonic() + (_END_S if self.memories else 0.0)
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for end in (*self.service_ends, self._wake, self._woken):
            end.close()
        self._folder.cleanup()
        if self._folder_lock >= 0:
            os.close(self._folder_lock)
            self._folder_lock = -1

    @property
    def pids(self) -> list[int]:
        """Of the followers, by rank."""
        return [process.pid for process in self._processes]

    def _meet(self) -> None:
        """All have loaded their weights: have them connect."""
        for rank in range(1, len(self._links) + 1):
            self._expect(rank, Kind.LOADED)
        for link in self._links:
            link.send(Kind.CONNECT)

    def _expect(self, rank: int, kind: Kind) -> bytes:
        """The next frame of a follower, which is to be of that kind."""
        if _first_readable([self._links[rank - 1]], BUILD_S) is None:
            raise EngineFailure(f"rank {rank} of this worker is not ready in {BUILD_S:g} s")
        found, content = self._next(rank)
        if found is not kind:
            raise EngineFailure(f"rank {rank} of this worker says {found.name}, not {kind.name}")
        return content

    def _next(self, rank: int) -> tuple[Kind, bytes]:
        """The next frame of a follower. Raises ServingError: it says it failed, or has ended."""
        try:
            found, content = self._links[rank - 1].receive()
        except (EOFError, OSError):
            raise self._ended(rank) from None
        if found is Kind.FAILED:
            fields = json.loads(content)
            cause: type[Exception] = getattr(errors, fields["kind"], EngineFailure)
            raise cause(fields["text"])
        return found, content

    def _ended(self, rank: int) -> EngineFailure:
        process = self._processes[rank - 1]
        with suppress(subprocess.TimeoutExpired):
            process.wait(_REASON_S)
        code = process.returncode
        how = "in no time" if code is None else f"with status {code}"
        return EngineFailure(f"rank {rank} of this worker has ended ({how})")


def _remove_stale_folders() -> None:
    """Of workers that were killed: nobody holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # it is in use
        finally:
            os.close(lock)


def _first_readable(
    ends: Sequence[Link | socket.socket], timeout_s: float | None = None
) -> int | None:
    """Which end, the first of them, has something to read or is closed; None: not in time."""
    with selectors.DefaultSelector() as selector:
        for place, end in enumerate(ends):
            selector.register(end, selectors.EVENT_READ, place)
        places = [int(key.data) for key, _ in selector.select(timeout_s)]
    return min(places, default=None)
