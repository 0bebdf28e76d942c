"""The life of one request: attempts on workers, one after the other, and one end for all.

This is the control path: place, wait for the attempt's end, try again (`router.retries` says
whether). Tokens go another way, without a task switch: see `router.delivery`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from contracts.errors import (
    EngineFailure,
    HandoffError,
    InvalidRequest,
    Overloaded,
    ServingError,
    Unavailable,
)
from contracts.worker import Role
from router.attempt import Attempt, HandoffRefused, WorkerFault, attempt_request
from router.config import RouterConfig
from router.delivery import Delivery
from router.detokenizer import Vocabulary
from router.job import Job, Usage
from router.logprobs import PromptEntry
from router.metrics import RequestTimes, RouterMetrics
from router.outbox import Outbox
from router.output import Output
from router.placement import Decision, DecodesFull, Need, NoCapacity, Path, choose
from router.retries import Retries
from router.workers import WorkerPool

logger = logging.getLogger(__name__)

_END_TIMEOUT_S = 5.0  # for a cancelled task, which has nothing to wait for


class Generation:
    """One request from its first placement to the release of everything it held.

    The owner calls `start`, reads `outbox`, and must call `aclose`: whatever ended the request,
    afterwards no worker does anything for it. All methods belong to the event loop.
    """

    def __init__(
        self,
        job: Job,
        *,
        pool: WorkerPool,
        vocabulary: Vocabulary,
        outbox: Outbox,
        config: RouterConfig,
        metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job = job
        self.outbox = outbox
        self.semantic_hash: str | None = None
        self._pool = pool
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._attempts = 0
        self._task: asyncio.Task[None] | None = None
        self._times = RequestTimes(metrics, clock)
        self._output = Output(job, vocabulary, outbox, self._times)
        self._delivery = Delivery(job, self._output, pool, metrics)
        self._retries = Retries(config, clock)

    @property
    def usage(self) -> Usage:
        """Counts so far: what was emitted, whatever it took."""
        return self._output.usage(self._delivery.cached_tokens)

    @property
    def kv_transfer_params(self) -> dict[str, Any] | None:
        """An export's, when it has begun."""
        return self._delivery.kv_transfer_params

    def prompt_entries(self) -> list[PromptEntry] | None:
        """The prompt's scores, complete before the first piece; slow for a long prompt."""
        return self._output.prompt_entries()

    def start(self) -> None:
        """Begin. Everything after this is reported through the outbox."""
        self._pool.register(self.job.request_id, self._delivery)
        self._task = asyncio.create_task(self._run(), name=f"request-{self.job.request_id}")

    def stop(self) -> None:
        """Release everything on both sides now; the outbox ends. Idempotent."""
        self._delivery.end()
        self._pool.unregister(self.job.request_id)
        self.outbox.close()
        if self._task is not None:
            self._task.cancel()

    async def aclose(self) -> None:
        """`stop`, then wait until the task is gone."""
        self.stop()
        if self._task is not None:
            _, late = await asyncio.wait({self._task}, timeout=_END_TIMEOUT_S)
            if late:
                logger.error("request %s does not end", self.job.request_id)

    async def _run(self) -> None:
        error: ServingError | None = None
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                await self._serve()
        except TimeoutError:
            error = Unavailable(f"it took longer than {self._config.request_timeout_s:g} s")
        except ServingError as caught:
            error = caught
        except Exception:  # one request's bug must not end the router
            logger.exception("request %s failed", self.job.request_id)
            error = EngineFailure("unexpected error in the router")
        finally:
            self._delivery.end()
            self._pool.unregister(self.job.request_id)
            self.outbox.close(error)
            self._report(error)

    def _report(self, error: ServingError | None) -> None:
        if error is not None:
            self._metrics.failed(type(error).__name__)
            counts = f"{self._output.emitted} tokens and {self._attempts} attempts"
            logger.warning("request %s failed after %s: %r", self.job.request_id, counts, error)
        elif self._output.finished:
            self._times.ended(len(self.job.prompt_ids), self._delivery.cached_tokens)

    # Attempts

    async def _serve(self) -> None:
        """Attempts until one ends well.

        Raises:
            ServingError: the last attempt's error, when no other may follow.
        """
        retries, output = self._retries, self._output
        while True:
            attempt = self._new_attempt(*await self._place())
            try:
                self._delivery.begin(attempt)
                await attempt.over
                return
            except HandoffRefused:
                # A D that stays may queue the prompt itself; where all are leaving, others come.
                retries.force_local |= any(
                    worker.role is Role.DECODE and not worker.load.draining
                    for worker in self._pool.snapshot()
                )
            except WorkerFault as fault:
                logger.warning("request %s: %s", self.job.request_id, fault)
                if attempt.decision.path is Path.ADOPTED:
                    if isinstance(fault.error, HandoffError):
                        raise InvalidRequest(str(fault.error), "kv_transfer_params") from None
                    retries.force_local = True  # it may be claimed, and has one claimer (C2)
                retries.add(fault, self._pool.instance(fault.worker_id), output.emitted)
                (self._metrics.replays if output.emitted else self._metrics.retries).inc()
            finally:
                self._delivery.end()

    def _new_attempt(self, need: Need, decision: Decision) -> Attempt:
        timeout_s = self._config.request_timeout_s
        spent_s = self._clock() - self._times.started_at
        request = attempt_request(
            self.job,
            self._output,
            decision.path,
            self._attempts,
            deadline_s=None if timeout_s is None else max(timeout_s - spent_s, 0.0),
            lease_ms=self._config.two_step_lease_ms,
        )
        self._attempts += 1
        self.semantic_hash = decision.semantic_hash
        self._metrics.placed(decision)
        logger.debug("request %s: %s", self.job.request_id, decision)
        over = asyncio.get_running_loop().create_future()
        return Attempt(request, decision, need, over, decode=decision.decode)

    # Placing

    def _need(self) -> Need:
        job, output = self.job, self._output
        return Need(
            prompt_tokens=len(job.prompt_ids),
            max_tokens=job.params.max_tokens,
            emitted_tokens=max(len(choice.token_ids) for choice in output.choices),
            semantic_hash=self.semantic_hash if output.emitted else None,
            force_local=self._retries.force_local,
            exclude=self._retries.excluded,
            step=None if job.transfer is None else job.transfer.step,
            num_choices=job.params.n,
        )

    def _choose(self, need: Need) -> Decision:
        return choose(self._pool.snapshot(), need, aggregated=self._config.aggregated)

    async def _place(self) -> tuple[Need, Decision]:
        """Choose workers. Waits while nobody can take the request, for the time there is.

        Raises:
            ServingError: what the only workers left have said, or NoCapacity.
            Overloaded: no D has had room for long.
        """
        retries = self._retries
        while True:
            need = self._need()
            try:
                return need, await self._choose_in_line(need)
            except NoCapacity as nobody:
                wait_s = retries.wait_s(self._output.emitted)
                if wait_s <= 0 or (retries.error is not None and self._decided(need)):
                    raise (retries.error or nobody) from None
            begun = self._clock()
            await self._pool.changed(wait_s)
            retries.waited(self._clock() - begun)

    def _decided(self, need: Need) -> bool:
        """Whether workers are there that could take it, but all of those have refused for good."""
        try:
            self._choose(replace(need, exclude=self._retries.undecided))
            return True
        except DecodesFull:
            return True
        except NoCapacity:
            return False

    async def _choose_in_line(self, need: Need) -> Decision:
        """Choose; whoever must wait for room on a D does so here, before any P computes.

        Nothing is held on any worker meanwhile, and who comes first goes first.

        Raises:
            NoCapacity: nobody could take it, room or not.
            Overloaded: no D has had room for `queue_wait_s`.
        """
        line = self._pool.line
        try:
            decision = self._choose(need)
            if decision.path is not Path.REMOTE or not line.locked():
                return decision
        except DecodesFull:
            pass
        try:
            async with asyncio.timeout(self._config.queue_wait_s), line:
                while True:
                    try:
                        return self._choose(need)
                    except DecodesFull:
                        await self._pool.changed(self._config.queue_wait_s)
        except TimeoutError:
            raise Overloaded("every decode worker is full") from None
