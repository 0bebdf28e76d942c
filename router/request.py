"""The life of one request: attempts on workers, tokens by position, one end for all.

`run` walks the control path (place, wait for the attempt's end, try again); the token path is
plain calls from the session's frame to the outbox, without a task switch.
"""

import asyncio
import json
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
from contracts.events import (
    Adopted,
    FinishReason,
    PathTaken,
    PrefillStarted,
    PromptScores,
    RequestFailed,
    TokensOut,
    WorkerEvent,
)
from contracts.ids import WorkerId
from router.attempt import (
    Attempt,
    HandoffRefused,
    WorkerFault,
    attempt_request,
    error_of,
    is_hopeless,
)
from router.choice import TokenFault
from router.config import RouterConfig
from router.detokenizer import Vocabulary
from router.job import Job, Usage
from router.logprobs import PromptEntry
from router.metrics import RequestTimes, RouterMetrics
from router.outbox import Outbox
from router.output import Output
from router.placement import Decision, Need, NoCapacity, Path, choose, choose_decode
from router.workers import WorkerPool

logger = logging.getLogger(__name__)
_BUG = "unexpected error in the router"


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
        self.kv_transfer_params: dict[str, Any] | None = None  # an export's, when it has begun
        self._pool = pool
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._cached_tokens = 0
        self._attempts = 0
        self._attempt: Attempt | None = None
        self._task: asyncio.Task[None] | None = None
        self._times = RequestTimes(metrics, clock)
        self._output = Output(job, vocabulary, outbox, self._times)

    @property
    def usage(self) -> Usage:
        """Counts so far: what was emitted, whatever it took."""
        return self._output.usage(self._cached_tokens)

    def prompt_entries(self) -> list[PromptEntry] | None:
        """The prompt's scores, complete before the first piece; slow for a long prompt."""
        return self._output.prompt_entries()

    def start(self) -> None:
        """Begin. Everything after this is reported through the outbox."""
        self._pool.register(self.job.request_id, self)
        self._task = asyncio.create_task(self._run(), name=f"request-{self.job.request_id}")

    def stop(self) -> None:
        """Release everything on both sides now; the outbox ends. Idempotent."""
        if self._attempt is not None:
            self._abort(self._attempt)
        self._pool.unregister(self.job.request_id)
        self.outbox.close()
        if self._task is not None:
            self._task.cancel()

    async def aclose(self) -> None:
        """`stop`, then wait until the task is gone."""
        self.stop()
        if self._task is not None:
            await asyncio.wait({self._task})

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
            error = EngineFailure(_BUG)
        finally:
            if self._attempt is not None:
                self._abort(self._attempt)
            self._pool.unregister(self.job.request_id)
            self.outbox.close(error)
            self._report(error)

    def _report(self, error: ServingError | None) -> None:
        if error is not None:
            self._metrics.failed(type(error).__name__)
            counts = f"{self._output.emitted} tokens and {self._attempts} attempts"
            logger.warning("request %s failed after %s: %r", self.job.request_id, counts, error)
        elif self._output.finished:
            self._times.ended(len(self.job.prompt_ids), self._cached_tokens)

    # Control path

    async def _serve(self) -> None:
        """Attempts until one ends well.

        Raises:
            ServingError: the last attempt's error, when no other may follow.
        """
        retries = replays = 0
        exclude: frozenset[WorkerId] = frozenset()
        force_local = False
        error: ServingError | None = None
        while True:
            need = Need(
                prompt_tokens=len(self.job.prompt_ids),
                max_tokens=self.job.params.max_tokens,
                emitted_tokens=max(len(choice.token_ids) for choice in self._output.choices),
                semantic_hash=self.semantic_hash if self._output.emitted else None,
                force_local=force_local,
                exclude=exclude,
                step=None if self.job.transfer is None else self.job.transfer.step,
            )
            decision = await self._place(need, error)
            attempt = self._new_attempt(decision)
            try:
                self._submit(attempt)
                await attempt.over
                return
            except HandoffRefused:
                force_local = True
                error = Overloaded("every decode worker is full")
                continue
            except WorkerFault as fault:
                logger.warning("request %s: %s", self.job.request_id, fault)
                error = fault.error
                if isinstance(error, HandoffError):
                    if attempt.decision.path is Path.ADOPTED:
                        raise InvalidRequest(str(error), "kv_transfer_params") from None
                    force_local = True
                elif not fault.lost:
                    exclude |= {fault.worker_id}
            finally:
                self._abort(attempt)
            if is_hopeless(error):
                raise error
            if self._output.emitted:
                replays += 1
                self._metrics.replays.inc()
            else:
                retries += 1
                self._metrics.retries.inc()
            if replays > self._config.max_replays or retries > self._config.max_retries:
                raise error

    async def _place(self, need: Need, error: ServingError | None) -> Decision:
        """Choose workers, waiting a while for one to connect.

        Raises:
            ServingError: `error`, if only a worker that failed with it is left; else NoCapacity.
        """
        wait_until = self._clock() + self._config.worker_wait_s
        while True:
            try:
                return choose(self._pool.snapshot(), need, aggregated=self._config.aggregated)
            except NoCapacity:
                if error is not None and need.exclude:
                    raise error from None
                left_s = wait_until - self._clock()
                if left_s <= 0:
                    raise
                await self._pool.changed(left_s)

    def _new_attempt(self, decision: Decision) -> Attempt:
        for choice in self._output.choices:
            choice.worker_finished = choice.finished  # those are not in the new attempt
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
        self._attempt = Attempt(request, decision, over, decode=decision.decode)
        return self._attempt

    def _submit(self, attempt: Attempt) -> None:
        """Send the attempt to its first worker.

        Raises:
            WorkerFault: that worker was lost meanwhile.
        """
        decision = attempt.decision
        worker_id = decision.prefill or decision.decode
        assert worker_id is not None
        if decision.path is Path.ADOPTED:
            assert self.job.transfer is not None
            attempt.transfer = self.job.transfer.params
            self._cached_tokens = min(self.job.transfer.cached_tokens, len(self.job.prompt_ids) - 1)
            self._offer(attempt)
            return
        try:
            self._pool.submit(worker_id, attempt.request, handoff=attempt.hands_over)
        except Unavailable as error:
            raise WorkerFault(worker_id, error, lost=True) from None
        attempt.prefill_active = worker_id == decision.prefill
        attempt.decode_active = worker_id == decision.decode
        attempt.accepted = not attempt.remote
        if attempt.remote and attempt.decode is not None:
            self._pool.expect(attempt.decode, self.job.request_id)

    def _abort(self, attempt: Attempt) -> None:
        """Stop the attempt wherever it may still hold something."""
        for worker_id in attempt.close():
            self._pool.abort(worker_id, attempt.request.request_id, attempt.request.attempt)
        if self._attempt is attempt:
            self._attempt = None

    # Token path: called by the worker pool

    def on_event(self, worker_id: WorkerId, event: WorkerEvent) -> None:
        """Take an event; those of other attempts or workers are dropped."""
        attempt = self._attempt
        if attempt is None or attempt.over.done() or event.attempt != attempt.request.attempt:
            return
        if worker_id not in (attempt.decision.prefill, attempt.decode):
            return
        try:
            self._handle(attempt, worker_id, event)
        except TokenFault as fault:
            self._metrics.token_faults.inc()
            logger.error("request %s, worker %s: %s", self.job.request_id, worker_id, fault)
            attempt.fail(fault)
        except (ServingError, WorkerFault, HandoffRefused) as error:
            attempt.fail(error)
        except Exception:  # one request's bug must not disturb the frame's other requests
            logger.exception("request %s: event of %s", self.job.request_id, worker_id)
            attempt.fail(EngineFailure(_BUG))

    def on_worker_lost(self, worker_id: WorkerId, reason: str) -> None:
        """A session broke; the attempt ends if it needed that worker."""
        attempt = self._attempt
        if attempt is not None and not attempt.over.done():
            fault = WorkerFault(worker_id, Unavailable("a worker was lost"), lost=True)
            self._worker_gone(attempt, worker_id, fault)

    def _handle(self, attempt: Attempt, worker_id: WorkerId, event: WorkerEvent) -> None:
        match event:
            case TokensOut():
                self._on_tokens(attempt, worker_id, event)
            case PromptScores():
                self._output.scores.add(event)
                if self._output.scores.complete and attempt.early:
                    self._emit_early(attempt)
            case PrefillStarted():
                if not self._output.emitted:  # a replay keeps the first attempt's
                    self._cached_tokens = event.cached_tokens
                if attempt.decision.path is Path.EXPORTED:
                    self.kv_transfer_params = json.loads(event.kv_transfer_params)
                elif attempt.remote and worker_id == attempt.decision.prefill:
                    attempt.transfer = event.kv_transfer_params
                    self._offer(attempt)
            case Adopted():
                if worker_id != attempt.decode:
                    return
                if event.accepted:
                    self._accept(attempt)
                else:
                    attempt.decode_active = False
                    self._offer_elsewhere(attempt, event.reason)
            case PathTaken():
                self._metrics.path("replayed" if attempt.request.output_ids else event.path)
                if event.num_bytes:
                    self._metrics.handoff(event)
            case RequestFailed():
                error = error_of(event.kind, event.message, event.param)
                self._worker_gone(attempt, worker_id, WorkerFault(worker_id, error))

    def _worker_gone(self, attempt: Attempt, worker_id: WorkerId, fault: WorkerFault) -> None:
        """A worker does no more for the attempt.

        Once a D accepted, it can do without the P; but if it took the prompt's KV before the P
        told us the prompt's scores, nobody will.
        """
        if worker_id == attempt.decode:
            if attempt.decode_active:
                attempt.decode_active = False
                attempt.fail(fault)
        elif worker_id == attempt.decision.prefill:
            attempt.prefill_gone = True
            needed = attempt.prefill_active and not (attempt.remote and attempt.accepted)
            attempt.prefill_active = False
            if needed or attempt.early:
                attempt.fail(fault)

    def _offer(self, attempt: Attempt) -> None:
        """Hand P's params to the D; raises HandoffRefused if none is left to ask."""
        assert attempt.decode is not None
        try:
            self._pool.adopt(attempt.decode, attempt.request, attempt.transfer)
            attempt.decode_active = True
        except Unavailable:
            self._offer_elsewhere(attempt, "not connected")

    def _offer_elsewhere(self, attempt: Attempt, reason: str) -> None:
        assert attempt.decode is not None
        attempt.refused.add(attempt.decode)
        self._metrics.refused_handoffs.inc()
        logger.info("request %s: %s refused: %s", self.job.request_id, attempt.decode, reason)
        need = Need(
            prompt_tokens=len(self.job.prompt_ids),
            max_tokens=self.job.params.max_tokens,
            semantic_hash=attempt.decision.semantic_hash,
            exclude=frozenset(attempt.refused),
        )
        try:
            attempt.decode = choose_decode(self._pool.snapshot(), need)
        except NoCapacity:
            raise HandoffRefused from None
        self._offer(attempt)

    def _accept(self, attempt: Attempt) -> None:
        """A D answers for the rest: what P drew may go out."""
        attempt.accepted = True
        held, attempt.held = attempt.held, []
        for event in held:
            assert attempt.decision.prefill is not None
            self._emit(attempt, attempt.decision.prefill, event)

    def _on_tokens(self, attempt: Attempt, worker_id: WorkerId, event: TokensOut) -> None:
        if attempt.decision.path is Path.EXPORTED:
            attempt.prefill_active = False  # it keeps the KV, under its lease
            event = replace(event, finish=FinishReason.LENGTH)
        if not attempt.remote:
            self._emit(attempt, worker_id, event)
            return
        if worker_id == attempt.decode:
            attempt.prefill_active = False  # its blocks were read and released
            if not attempt.accepted:
                self._accept(attempt)
            if self._output.scores.complete:
                self._emit(attempt, worker_id, event)
            elif attempt.prefill_gone:
                raise WorkerFault(worker_id, Unavailable("a worker was lost"), lost=True)
            else:  # it has overtaken the P's
                attempt.early.append(event)
            return
        if attempt.accepted:
            self._emit(attempt, worker_id, event)
            return
        attempt.held.append(event)
        ended = {held.choice for held in attempt.held if held.finish is not None}
        if len(ended) == self.job.params.n:  # nothing is left to decode
            attempt.prefill_active = False
            self._accept(attempt)

    def _emit_early(self, attempt: Attempt) -> None:
        early, attempt.early = attempt.early, []
        for event in early:
            assert attempt.decode is not None
            self._emit(attempt, attempt.decode, event)

    def _emit(self, attempt: Attempt, worker_id: WorkerId, event: TokensOut) -> None:
        """Put a frame's new tokens into the outbox, those of beams when all have come.

        Raises:
            TokenFault: the tokens contradict earlier ones.
            EngineFailure: they came without the prompt's scores.
            SlowReader: the outbox is full.
            WorkerFault: the worker gave the choice up.
        """
        if not 0 <= event.choice < len(self._output.choices):
            raise TokenFault(f"choice {event.choice} does not exist")
        if not self._output.scores.complete:
            raise EngineFailure("a worker sent tokens before the prompt's log-probabilities")
        if not self.job.params.beam:
            self._show(attempt, worker_id, event)
            return
        if event.finish is FinishReason.ABORT:
            raise WorkerFault(worker_id, Unavailable("a worker stopped the request"))
        if event.finish is None:  # candidates; what becomes of them is not known
            return
        attempt.beams[event.choice] = event
        if len(attempt.beams) == len(self._output.choices):
            for _, beam in sorted(attempt.beams.items()):
                self._show(attempt, worker_id, beam)

    def _show(self, attempt: Attempt, worker_id: WorkerId, event: TokensOut) -> None:
        gave_up = event.finish is FinishReason.ABORT
        self._output.show(replace(event, finish=None) if gave_up else event)
        if gave_up and not self._output.choices[event.choice].finished:
            raise WorkerFault(worker_id, Unavailable("a worker stopped the request"))
        if event.finish is not None and self._output.worker_finished:
            attempt.decode_active = False
            if attempt.decision.path is Path.PREFILL_ONLY:
                attempt.prefill_active = False
        if self._output.finished:
            attempt.finish()
