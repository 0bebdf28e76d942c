"""Compiles grammars for a worker: bounded, cached, and away from its event loop.

Two lanes, each with a child process of its own: what is not compiled within `QUICK_S` in the first
is started again in the second, where it may use up its time without anybody waiting behind it
except its like.
"""

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from contracts.errors import (
    EngineFailure,
    InvalidRequest,
    Overloaded,
    ServingError,
    Unavailable,
)
from contracts.sampling import Grammar, GrammarKind
from engine.grammar_backends import FIRST, SECOND, Backends
from engine.grammar_lane import ChildSettings, Job, Lane
from engine.grammar_matcher import ReadyGrammar, TextGrammar
from engine.grammar_regex import MAX_REGEX
from engine.grammar_schema import MAX_SCHEMA
from engine.guide import CompiledGrammar

QUICK_S = 2.0
MAX_REFUSALS = 256  # remembered, so that a bad grammar sent again costs nothing
log = logging.getLogger(__name__)


class GrammarCompiler:
    """Grammars ready for draws, for one tokenizer. `compile` and `close` on one event loop.

    `vocab_size` is the width of the model's logits. A child process is started with the first
    grammar or `warm`, and is gone after `close` or with this process.
    """

    def __init__(
        self,
        tokenizer_path: Path,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        *,
        time_limit_s: float = 20.0,
        memory_limit_bytes: int = 1 << 30,
        max_pending: int = 64,
        cache_bytes: int = 256 << 20,
    ) -> None:
        self._ends = tuple(token for token in eos_token_ids if token < vocab_size)
        self._path = tokenizer_path
        self._time_limit_s = time_limit_s
        self._max_pending = max_pending
        self._cache_bytes = cache_bytes
        self._backends = Backends(tokenizer_path, vocab_size, self._ends)
        self._backends_lock = threading.Lock()
        self._lock = threading.Lock()  # guards what follows
        self._jobs: dict[Grammar, Job] = {}
        self._ready: OrderedDict[Grammar, TextGrammar] = OrderedDict()
        self._refused: OrderedDict[Grammar, str] = OrderedDict()
        self._closed = False
        settings = ChildSettings(tokenizer_path, vocab_size, self._ends, memory_limit_bytes)
        self._slow = Lane("grammar-slow", settings, time_limit_s, self._give_up, keeps_child=False)
        two = time_limit_s > QUICK_S
        self._quick = Lane(
            "grammar",
            settings,
            min(QUICK_S, time_limit_s),
            self._slow.put if two else self._give_up,
            prepare=self._prepare,
        )

    @property
    def child_pids(self) -> tuple[int, ...]:
        """Process ids of the children that run now."""
        return tuple(p for p in (self._quick.pid, self._slow.pid) if p is not None)

    def warm(self) -> None:
        """Start the child and make both backends ready here; returns at once. Idempotent."""
        self._quick.warm()

    async def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Make a grammar ready; equal ones are compiled once.

        Raises:
            InvalidRequest: it cannot be enforced, or not within the limits; with the reason.
            Overloaded: too many wait.
            Unavailable: closed.
        """
        ends = grammar.end_token_ids or self._ends
        key = replace(grammar, start_after=(), opened_by=None, end_token_ids=())
        job = self._find(key)
        if isinstance(job, Job):
            try:
                found = await asyncio.shield(asyncio.wrap_future(job.future))
            finally:
                with self._lock:
                    job.waiters -= 1
        else:
            found = job
        if isinstance(found, ServingError):
            if isinstance(found, InvalidRequest):
                raise InvalidRequest(str(found))  # its own: an exception is raised once
            raise type(found)(str(found))
        return ReadyGrammar(found, ends)  # type: ignore[arg-type]

    def close(self) -> None:
        """Kill the children and wait for them; whoever waits gets Unavailable. Idempotent."""
        with self._lock:
            self._closed = True
        self._quick.close()
        self._slow.close()

    def _find(self, key: Grammar) -> Job | TextGrammar | ServingError:
        """What is known of a grammar, or the job that finds out."""
        with self._lock:
            if self._closed:
                return Unavailable("the worker is closing")
            if key in self._ready:
                self._ready.move_to_end(key)
                return self._ready[key]
            if key in self._refused:
                self._refused.move_to_end(key)
                return InvalidRequest(self._refused[key])
            job = self._jobs.get(key)
            if job is None:
                _check_size(key)
                if len(self._jobs) >= self._max_pending:
                    raise Overloaded(f"{len(self._jobs)} grammars are waiting to be compiled")
                job = Job(key, self._finish)
                self._jobs[key] = job
                job.waiters = 1
                self._quick.put(job)
            else:
                job.waiters += 1
            return job

    def _give_up(self, job: Job) -> None:
        limit = f"compiling the grammar takes more than {self._time_limit_s:g} s"
        self._finish(job, InvalidRequest(limit))

    def _finish(self, job: Job, result: tuple[str, bytes] | ServingError) -> None:
        """Runs in a lane's thread. What the child has proved harmless is compiled again here."""
        outcome: TextGrammar | ServingError
        if isinstance(result, ServingError):
            outcome = result
        else:
            name, source = result
            try:
                with self._backends_lock:
                    backend = self._backends.get(name)
                outcome = backend.load(source)
            except ServingError as error:
                outcome = error
            except Exception as error:  # a bug of a backend's; the next request tries again
                log.exception("%s cannot load a grammar that its child compiled", name)
                outcome = EngineFailure(f"the grammar cannot be loaded ({type(error).__name__})")
        with self._lock:
            self._jobs.pop(job.grammar, None)
            if isinstance(outcome, InvalidRequest):
                self._refused[job.grammar] = str(outcome)
                while len(self._refused) > MAX_REFUSALS:
                    self._refused.popitem(last=False)
            elif not isinstance(outcome, ServingError):
                self._remember(job.grammar, outcome)
        job.future.set_result(outcome)

    def _remember(self, key: Grammar, text: TextGrammar) -> None:
        self._ready[key] = text
        held = sum(one.num_bytes + len(k.text) for k, one in self._ready.items())
        while held > self._cache_bytes and self._ready:
            old, one = self._ready.popitem(last=False)
            held -= one.num_bytes + len(old.text)

    def _prepare(self) -> None:
        """Runs once in the quick lane's thread: what is slow the first time."""
        for name in (FIRST, SECOND):
            with self._backends_lock:
                try:
                    self._backends.get(name)
                except InvalidRequest:
                    return  # each request will tell
                except Exception:
                    log.exception("%s cannot be made ready", name)


def _check_size(grammar: Grammar) -> None:
    """Refuse what is too large to be worth a look.

    Raises:
        InvalidRequest: it says what the limit is.
    """
    is_regex = grammar.kind is GrammarKind.REGEX
    limit = MAX_REGEX if is_regex else MAX_SCHEMA
    for text, most in ((grammar.text, limit), (grammar.whitespace_pattern, MAX_REGEX)):
        if len(text) > most:
            kind = grammar.kind.value
            raise InvalidRequest(f"a grammar of kind {kind} may have {most} characters at most")
