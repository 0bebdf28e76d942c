"""The token path of a request: from a worker's frame to the outbox, without a task switch.

It also tells workers what an attempt needs of them: the prompt, the offer of a handoff, the abort.
"""

import json
import logging
from dataclasses import replace
from typing import Any

from contracts.errors import EngineFailure, Overloaded, ServingError, Unavailable
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
from router.attempt import Attempt, HandoffRefused, WorkerFault, error_of
from router.choice import TokenFault
from router.job import Job
from router.metrics import RouterMetrics
from router.output import Output
from router.placement import NoCapacity, Path, choose_decode
from router.workers import WorkerPool

logger = logging.getLogger(__name__)


class Delivery:
    """Runs one attempt at a time, and shows what comes of it strictly by position.

    `cached_tokens` are those found where the prompt was first computed (later attempts find what
    that one left); `kv_transfer_params` an export's, once it has begun. The pool calls `on_event`
    and `on_worker_lost`; the attempt's future tells the control path how it ended.
    """

    def __init__(self, job: Job, output: Output, pool: WorkerPool, metrics: RouterMetrics) -> None:
        self.cached_tokens = 0
        self._counted = False  # they are known
        self.kv_transfer_params: dict[str, Any] | None = None
        self._job = job
        self._output = output
        self._pool = pool
        self._metrics = metrics
        self._attempt: Attempt | None = None

    # What the control path asks for

    def begin(self, attempt: Attempt) -> None:
        """Send the attempt to its first worker.

        Raises:
            WorkerFault: that worker was lost meanwhile, or nothing more can be sent to it now.
        """
        self._attempt = attempt
        for choice in self._output.choices:
            choice.worker_finished = choice.finished  # those are not in the new attempt
        decision = attempt.decision
        worker_id = decision.prefill or decision.decode
        assert worker_id is not None
        if decision.path is Path.ADOPTED:
            given = self._job.transfer
            assert given is not None
            attempt.transfer = given.params
            self._counted = True
            self.cached_tokens = min(given.cached_tokens, len(self._job.prompt_ids) - 1)
            self._offer(attempt)
            return
        try:
            self._pool.submit(worker_id, attempt.request, handoff=attempt.hands_over)
        except Unavailable as error:
            raise WorkerFault(worker_id, error, lost=True) from None
        except Overloaded as error:
            raise WorkerFault(worker_id, error) from None
        attempt.prefill_active = worker_id == decision.prefill
        attempt.decode_active = worker_id == decision.decode
        attempt.accepted = not attempt.remote
        if attempt.remote and attempt.decode is not None:
            self._pool.expect(attempt.decode, self._job.request_id, attempt.need)

    def end(self) -> None:
        """Stop the attempt wherever it may still hold something. Idempotent."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        for worker_id in attempt.close():
            self._pool.abort(worker_id, attempt.request.request_id, attempt.request.attempt)
        if attempt.decode is not None:
            self._pool.forget(attempt.decode, attempt.request.request_id)

    # What the pool reports

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
            logger.error("request %s, worker %s: %s", self._job.request_id, worker_id, fault)
            attempt.fail(fault)
        except (ServingError, WorkerFault, HandoffRefused) as error:
            attempt.fail(error)
        except Exception:  # one request's bug must not disturb the frame's other requests
            logger.exception("request %s: event of %s", self._job.request_id, worker_id)
            attempt.fail(EngineFailure("unexpected error in the router"))

    def on_worker_lost(self, worker_id: WorkerId, *, drained: bool) -> None:
        """A session broke; the attempt ends if it needed that worker."""
        attempt = self._attempt
        if attempt is not None and not attempt.over.done():
            self._worker_gone(attempt, worker_id, _lost(worker_id, drained=drained))

    def _handle(self, attempt: Attempt, worker_id: WorkerId, event: WorkerEvent) -> None:
        match event:
            case TokensOut():
                self._on_tokens(attempt, worker_id, event)
            case PromptScores():
                self._output.scores.add(event)
                if self._output.scores.complete and attempt.early:
                    self._emit_early(attempt)
            case PrefillStarted():
                if not self._counted:
                    self._counted, self.cached_tokens = True, event.cached_tokens
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

    # The handoff

    def _offer(self, attempt: Attempt) -> None:
        """Hand P's params to the D; raises HandoffRefused if none is left to ask."""
        assert attempt.decode is not None
        try:
            self._pool.adopt(attempt.decode, attempt.request, attempt.transfer, attempt.need)
            attempt.decode_active = True
        except (Unavailable, Overloaded) as error:
            self._offer_elsewhere(attempt, str(error))

    def _offer_elsewhere(self, attempt: Attempt, reason: str) -> None:
        assert attempt.decode is not None
        refused = self._pool.instance(attempt.decode)
        if refused is not None:
            attempt.refused.add(refused)
        self._pool.forget(attempt.decode, self._job.request_id)
        self._metrics.refused_handoffs.inc()
        logger.info("request %s: %s refused: %s", self._job.request_id, attempt.decode, reason)
        need = replace(
            attempt.need,
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

    # Tokens

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
                raise _lost(worker_id, drained=True)  # not this worker's doing
            else:  # it has overtaken the P's
                attempt.early.append(event)
            return
        if attempt.accepted:
            self._emit(attempt, worker_id, event)
            return
        attempt.held.append(event)
        ended = {held.choice for held in attempt.held if held.finish is not None}
        if len(ended) == self._job.params.n:  # nothing is left to decode
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
        if not self._job.params.beam:
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


def _lost(worker_id: WorkerId, *, drained: bool) -> WorkerFault:
    return WorkerFault(worker_id, Unavailable("a worker was lost"), lost=True, drained=drained)
