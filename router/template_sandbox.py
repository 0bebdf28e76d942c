"""Templates that clients send, rendered where they can do no harm: in a few child processes.

Jinja's sandbox keeps a template away from Python, but not from time and memory: a filter with a
huge argument is one uninterruptible call. A child process can be killed. It is started at the
first use, keeps its compiled templates, and is replaced when it dies.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from contracts.errors import InvalidRequest, Overloaded, Unavailable
from router.prompt_request import PromptRequest
from router.template import Rendered
from router.template_child import read_frame, write_frame

_START_S = 10.0  # what a child may need to start, on a busy machine
_KILL_AFTER_S = 2.0  # past the template's limit; the child's own alarm comes first
_MAX_SOURCE_CHARS = 1 << 18
_MAX_WAITING = 64
_PARAM = "chat_template"
_BUSY = "too many requests with chat templates of their own are waiting"


class TemplateSandbox:
    """Renders one template at a time in each of `processes` children; more wait their turn.

    Called on the event loop; the threads only wait for the children.
    """

    def __init__(
        self, *, processes: int = 2, timeout_s: float = 5.0, memory_bytes: int = 1 << 30
    ) -> None:
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="template")
        self._limit = processes + _MAX_WAITING
        self._waiting = 0
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._closed = False

    async def render(
        self, request: PromptRequest, special_tokens: Mapping[str, str], *, max_chars: int
    ) -> Rendered:
        """Render `request.chat_template`.

        Raises:
            InvalidRequest: the template is wrong, refuses the messages, or breaks a limit.
            Overloaded: too many wait already, or its turn did not come in time.
        """
        assert request.chat_template is not None
        if len(request.chat_template) > _MAX_SOURCE_CHARS:
            raise InvalidRequest(
                f"the chat template is longer than {_MAX_SOURCE_CHARS} characters", _PARAM
            )
        if self._waiting >= self._limit:
            raise Overloaded(_BUSY)
        question = {
            "template": request.chat_template,
            "special_tokens": dict(special_tokens),
            "timeout_s": self._timeout_s,
            "max_chars": max_chars,
            "request": {field.name: getattr(request, field.name) for field in fields(request)},
        }
        self._waiting += 1
        try:
            job = self._threads.submit(self._ask, question, time.monotonic())
            answer = await asyncio.wrap_future(job)
        finally:
            self._waiting -= 1
        if "error" in answer:
            raise InvalidRequest(answer["error"], answer["param"])
        return Rendered(answer["text"], answer["last_role"], answer["last_text"])

    def close(self) -> None:
        """End the children, those at work too."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for child in self._all:
                child.kill()  # who is at work is closed by its thread
        for child in idle:
            self._drop(child)

    def _ask(self, question: dict[str, Any], queued_at: float) -> dict[str, Any]:
        if time.monotonic() > queued_at + self._timeout_s:
            raise Overloaded(_BUSY)
        body = json.dumps(question, default=dict).encode()
        # JSON writes a character with at most 12 bytes; the last message comes back as well.
        max_answer_bytes = 12 * question["max_chars"] + len(body) + 65536
        child = self._take()
        answer = child.ask(body, max_answer_bytes, self._timeout_s + _KILL_AFTER_S)
        if answer is None:
            self._drop(child)
            raise InvalidRequest("the chat template takes too much time or memory", _PARAM)
        with self._lock:
            if keep := not self._closed:
                self._idle.append(child)
        if not keep:
            self._drop(child)
        return answer

    def _take(self) -> "_Child":
        with self._lock:
            if self._closed:
                raise Unavailable("the server is shutting down")
            if self._idle:
                return self._idle.pop()
            child = _Child(self._memory_bytes)
            self._all.add(child)
            return child

    def _drop(self, child: "_Child") -> None:
        with self._lock:
            self._all.discard(child)
        child.close()


class _Child:
    """One child process and its pipes; used by one thread at a time."""

    def __init__(self, memory_bytes: int) -> None:
        # Nothing of our environment: it may hold keys.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "router.template_child", str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,  # no Ctrl-C of the terminal
        )
        self._asked = False

    def ask(self, body: bytes, max_answer_bytes: int, timeout_s: float) -> dict[str, Any] | None:
        """The child's answer; None if it died or was killed after `timeout_s`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(timeout_s + (0 if self._asked else _START_S), self._process.kill)
        timer.daemon = True
        timer.start()
        self._asked = True
        try:
            write_frame(self._process.stdin, body)
            answer = read_frame(self._process.stdout, max_answer_bytes)
            return json.loads(answer) if answer else None
        except (OSError, ValueError):
            return None
        finally:
            timer.cancel()

    def kill(self) -> None:
        """End it now; whoever waits for its answer gets None."""
        self._process.kill()

    def close(self) -> None:
        """Kill it and give its pipes back."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not flushed finds no reader
                    pipe.close()
