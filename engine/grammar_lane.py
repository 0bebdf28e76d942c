"""A queue of grammars with one compiling child process, which a watcher may kill."""

import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import psutil

from contracts.errors import InvalidRequest, ServingError, Unavailable
from contracts.sampling import Grammar
from engine.grammar_child import grammar_to_json, read_frame, write_frame

STARTUP_S = 120.0
POLL_S = 0.01
RECYCLE = 4  # a child that has kept a quarter of the memory limit is replaced
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from engine.grammar_child import main; main()"
)
log = logging.getLogger(__name__)


class TooSlow(Exception):
    """The grammar was not compiled within the lane's time."""


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """What a child is started with."""

    path: Path
    vocab_size: int
    end_token_ids: tuple[int, ...]
    memory_limit_bytes: int


@dataclass(slots=True, eq=False)
class Job:
    """A grammar to compile. `done` gets (backend, source) or the reason; `waiters` want it."""

    grammar: Grammar
    done: Callable[["Job", tuple[str, bytes] | ServingError], None]
    future: "Future[object]" = field(default_factory=lambda: Future[object]())
    waiters: int = 0


class Child:
    """One compiling process. Only its lane's thread talks to it."""

    def __init__(self, settings: ChildSettings) -> None:
        self._limit = settings.memory_limit_bytes
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # backends print what clients send
        )
        self._usage = psutil.Process(self._process.pid)
        self._base = 0
        with suppress(OSError):  # dead already; `start` will tell
            self._send(
                {
                    "path": str(settings.path),
                    "vocab_size": settings.vocab_size,
                    "ends": settings.end_token_ids,
                    "memory_limit_bytes": settings.memory_limit_bytes,
                    "parent": os.getpid(),
                }
            )

    def start(self) -> None:
        """Wait until it can compile. Idempotent.

        Raises:
            TooSlow, EOFError, OSError: it does not start.
        """
        if self._base:
            return
        self._wait(STARTUP_S, watch_memory=False)
        read_frame(self._output)
        self._base = max(1, self._grown())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def _output(self) -> BinaryIO:
        return cast(BinaryIO, self._process.stdout)

    def _send(self, head: dict[str, Any]) -> None:
        write_frame(cast(BinaryIO, self._process.stdin), head)

    def compile(self, grammar: Grammar, limit_s: float) -> tuple[str, bytes]:
        """Have a grammar compiled.

        Raises:
            InvalidRequest: refused, with the reason.
            TooSlow: not done in `limit_s`. The child must be killed, as after the next two.
            MemoryError: it uses too much memory.
            EOFError, OSError: it has died.
        """
        self._send(grammar_to_json(grammar))
        started = time.monotonic()
        self._wait(limit_s, watch_memory=True)
        head, source = read_frame(self._output)
        if "refused" in head:
            raise InvalidRequest(head["refused"])
        log.debug("%s compiled in %.3f s", grammar.kind, time.monotonic() - started)
        return head["backend"], source

    def _wait(self, limit_s: float, *, watch_memory: bool) -> None:
        deadline = time.monotonic() + limit_s
        while not select.select([self._output], [], [], POLL_S)[0]:
            if time.monotonic() > deadline:
                raise TooSlow
            if watch_memory and self._grown() > self._limit:
                raise MemoryError

    def _grown(self) -> int:
        try:
            return int(self._usage.memory_info().rss) - self._base
        except psutil.Error:
            return 0  # it is dead: its pipe is at its end

    @property
    def bloated(self) -> bool:
        """Whether it has kept much memory of earlier grammars."""
        return self._grown() > self._limit // RECYCLE

    def kill(self) -> None:
        """End it now; any thread may ask for that. Whoever reads from it gets EOFError."""
        self._process.kill()

    def bury(self) -> None:
        """End it, wait until it is gone, close its pipes. Idempotent."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


class Lane:
    """Compiles one grammar after the other. A job that is `too_slow` goes to that callback.

    The thread and the child live from the first job (or `warm`) to `close`.
    """

    def __init__(
        self,
        name: str,
        settings: ChildSettings,
        limit_s: float,
        too_slow: Callable[[Job], None],
        *,
        prepare: Callable[[], None] = lambda: None,
        keeps_child: bool = True,
    ) -> None:
        self._settings = settings
        self._limit_s = limit_s
        self._too_slow = too_slow
        self._keeps_child = keeps_child  # also while nothing waits
        self._prepare = prepare  # runs once in the lane's thread, while the child starts
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def pid(self) -> int | None:
        """The child's process id, if one runs."""
        child = self._child
        return None if child is None else child.pid

    def warm(self) -> None:
        """Start the thread and the child. Idempotent."""
        with self._lock:
            if not self._closed and self._thread.ident is None:
                self._thread.start()

    def put(self, job: Job) -> None:
        """Queue a job."""
        self._jobs.put(job)
        self.warm()

    def close(self) -> None:
        """Kill the child, answer all jobs, end the thread. Idempotent."""
        with self._lock:
            self._closed = True
            child = self._child
            started = self._thread.ident is not None
        if child is not None:
            child.kill()
        self._jobs.put(None)
        if started:
            self._thread.join()
        self._refuse_rest()

    def _run(self) -> None:
        with suppress(Unavailable):
            self._spawn()
        self._prepare()
        while (job := self._jobs.get()) is not None and not self._closed:
            if job.waiters > 0:
                self._serve(job)
            else:
                job.done(job, Unavailable("nobody waits for this grammar any more"))
            if not self._keeps_child and self._jobs.empty():
                self._drop_child()
        if job is not None:
            job.done(job, Unavailable("the worker is closing"))
        self._drop_child()
        self._refuse_rest()

    def _refuse_rest(self) -> None:
        with suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job.done(job, Unavailable("the worker is closing"))

    def _spawn(self) -> Child:
        if self._child is None:
            with self._lock:
                if self._closed:
                    raise Unavailable("the worker is closing")
                self._child = Child(self._settings)
        return self._child

    def _drop_child(self) -> None:
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.bury()

    def _serve(self, job: Job) -> None:
        try:
            result = self._compile(job)
        except TooSlow:
            self._drop_child()
            self._too_slow(job)
            return
        except MemoryError:
            self._drop_child()
            limit = self._settings.memory_limit_bytes >> 20
            result = InvalidRequest(f"compiling the grammar takes more than {limit} MiB of memory")
        job.done(job, result)
        if self._child is not None and self._child.bloated:
            self._drop_child()

    def _compile(self, job: Job) -> tuple[str, bytes] | ServingError:
        """Ask the child; twice, for it may have died of something else before."""
        for _ in range(2):
            try:
                child = self._spawn()
                child.start()
            except Unavailable as error:
                return error
            except (OSError, EOFError, TooSlow) as error:
                self._drop_child()
                if not self._closed:
                    log.warning("the grammar compiler does not start: %s", type(error).__name__)
                return Unavailable("the grammar compiler does not start")
            try:
                return child.compile(job.grammar, self._limit_s)
            except InvalidRequest as error:
                return error
            except (OSError, EOFError):
                self._drop_child()
        return InvalidRequest("the grammar compiler failed on this grammar")
