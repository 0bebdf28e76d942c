"""The engine thread: commands in, steps, events out. Nothing else touches scheduler and pool."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

from contracts.errors import EngineFailure
from contracts.events import WorkerLoad
from engine.audit import Finding, Known
from engine.block_pool import LedgerFault
from engine.plan import StepPlan, StepResult
from engine.scheduler import EngineEvent, Scheduler

T = TypeVar("T")
log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.25  # an idle engine shows a pulse this often


class StepComputer(Protocol):
    """Computes a plan: draws and scores, in plan order. Returns when the device is done."""

    def compute(self, plan: StepPlan) -> StepResult:
        """Compute one step."""
        ...

    def forget(self, sequences: Sequence[int]) -> None:
        """These (Chunk.sequence) are over; what is kept for them may go."""
        ...


class Engine:
    """Runs a scheduler and a computer in one thread.

    `on_events` is called in the engine thread after every step that has something to tell,
    `on_failure` if that thread dies of an error: no request of it will say anything more.

    The ledger is verified whenever there is something to tell, and before it is told. A pool that
    contradicts itself ends the engine (LedgerFault), also if a command finds it so. With
    `check_ledger` every block is looked at each time.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        computer: StepComputer,
        on_events: Callable[[list[EngineEvent]], None],
        on_failure: Callable[[BaseException], None] = lambda error: None,
        *,
        check_ledger: bool = False,
    ) -> None:
        self._scheduler = scheduler
        self._computer = computer
        scheduler.move = self._move
        self._on_events = on_events
        self._on_failure = on_failure
        self._check_ledger = check_ledger
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._paused_until = 0.0  # the thread's own
        self._pulse_s = time.monotonic()
        self._load = scheduler.load()
        self.steps = 0
        self.busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="baton-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after its current step. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def fail(self, error: BaseException) -> None:
        """A part that the thread needs has died (any thread may say so); heard of only once."""
        with self._wake:
            if self._stopping or self._failure is not None:
                return
            self._failure = error
            self._stopping = True
            self._wake.notify()
        log.error("the engine failed: %s", error)
        self._on_failure(error)

    @property
    def load(self) -> WorkerLoad:
        """The load after the last step or command (any thread)."""
        return self._load

    def call(self, function: Callable[[Scheduler], T]) -> "Future[T]":
        """Run `function` in the engine thread before its next step (any thread may ask)."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self._failure is not None:  # it may have died within a step
                future.set_exception(EngineFailure("the engine has failed"))
                return
            try:
                future.set_result(function(self._scheduler))
            except LedgerFault as fault:
                future.set_exception(fault)
                raise
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._stopping or self._failure is not None:
                future.set_exception(EngineFailure("the engine has stopped"))
                return future
            self._commands.append(run)
            self._wake.notify()
        return future

    def pause(self, limit_s: float) -> "Future[int]":
        """Make no step until `resume`, for `limit_s` at most; commands still run.

        Once it resolves on an event loop, that loop has been handed all events so far. The result
        is the number of the last step, see `audit`.
        """

        def pause(scheduler: Scheduler) -> int:
            self._paused_until = time.monotonic() + limit_s
            return scheduler.step

        return self.call(pause)

    def resume(self) -> None:
        """End the pause."""

        def resume(scheduler: Scheduler) -> None:
            self._paused_until = 0.0

        self.call(resume)

    def audit(self, step: int, known: Known) -> "Future[set[Finding] | None]":
        """What is wrong with the blocks; None if `step` is not the last step any more.

        `known` is what the commander knows after all events up to `step`, with its own commands.
        """
        return self.call(
            lambda scheduler: scheduler.audit(known) if scheduler.step == step else None
        )

    def assert_pulse(self, limit_s: float = 60.0) -> None:
        """Raise EngineFailure if the thread has died or not come round for `limit_s`."""
        if self._failure is not None:
            raise EngineFailure(f"the engine failed: {self._failure!r}")
        if not self._thread.is_alive():
            raise EngineFailure("the engine thread is not running")
        silent = time.monotonic() - self._pulse_s
        if silent > limit_s:
            raise EngineFailure(f"the engine has not come round for {silent:.0f} s")

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            log.exception("the engine failed")
            with self._wake:
                told = self._failure is not None
                self._failure = self._failure or error
            if not told:
                self._on_failure(error)
        finally:
            self._run_last_commands()

    def _turn(self) -> bool:
        self._pulse_s = time.monotonic()
        with self._wake:
            if self._stopping:
                return False
            paused_s = self._paused_until - time.monotonic()
            if not self._commands and (paused_s > 0 or not self._scheduler.has_work):
                self._wake.wait(min(paused_s, _IDLE_WAIT_S) if paused_s > 0 else _IDLE_WAIT_S)
            commands = len(self._commands)
        for _ in range(commands):  # one that ends the engine leaves the others to be refused
            self._commands.popleft()()
        if self._scheduler.has_work and time.monotonic() >= self._paused_until:
            self._step()
        elif commands:
            self._publish()
        return True

    def _step(self) -> None:
        began = time.monotonic()
        plan = self._scheduler.schedule()
        if plan.empty:
            self._publish()
            with self._wake:  # nothing runs and nothing fits: only a command can change that
                if not self._commands and not self._stopping:
                    self._wake.wait(_IDLE_WAIT_S)
            return
        # Params go out before the compute: the D reserves while P computes.
        self._publish()
        self._scheduler.commit(plan, self._computer.compute(plan))
        self.steps += 1
        self.busy_s += time.monotonic() - began
        self._publish()

    def _move(self, plan: StepPlan) -> None:
        """Compute a plan within a command. Raises LedgerFault: nobody knows what was moved."""
        try:
            self._computer.compute(plan)
        except Exception as error:
            raise LedgerFault("KV blocks could not be moved") from error

    def _publish(self) -> None:
        pool = self._scheduler.pool
        pool.verify()
        if self._check_ledger:
            pool.check()
        over = self._scheduler.take_over()
        if over:
            self._computer.forget(over)
        self._load = self._scheduler.load()
        events = self._scheduler.take_events()
        if events:
            self._on_events(events)

    def _run_last_commands(self) -> None:
        """Nobody waits for ever: those asked for before the end still run, later ones fail.

        After a failure all of them fail.
        """
        with self._wake:
            self._stopping = True
            while self._commands:
                try:
                    self._commands.popleft()()
                except LedgerFault:
                    log.exception("the engine stopped with a broken ledger")
            if self._failure is None:
                self._load = self._scheduler.load()
