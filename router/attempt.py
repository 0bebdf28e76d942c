"""One attempt of a request: which workers hold something for it, and how it ended."""

import asyncio
from dataclasses import dataclass, field, replace

import contracts.errors
from contracts.errors import (
    EngineFailure,
    InvalidRequest,
    NotFound,
    ServingError,
    UnsupportedModel,
)
from contracts.events import TokensOut
from contracts.ids import WorkerId
from contracts.request import GenerationRequest
from router.job import Job
from router.output import Output
from router.placement import Decision, Instance, Need, Path
from router.two_step import computed


class WorkerFault(Exception):
    """An attempt ended by a worker's fault; another one may follow.

    `lost`: the session broke, so the worker itself may be fine; `drained`: as was to be expected.
    """

    def __init__(
        self, worker_id: WorkerId, error: ServingError, *, lost: bool = False, drained: bool = False
    ) -> None:
        super().__init__(f"{worker_id}: {type(error).__name__}: {error}")
        self.worker_id = worker_id
        self.error = error
        self.lost = lost
        self.drained = drained


class HandoffRefused(Exception):
    """No D takes the handoff."""


@dataclass(slots=True, eq=False)
class Attempt:
    """`prefill_active` and `decode_active`: that worker may still hold something for us.

    `decode` changes when a D refuses. `held` are P's tokens that wait for a D to accept, `early`
    a D's that came before the prompt's scores, and `beams` those that wait for the others.
    """

    request: GenerationRequest
    decision: Decision
    need: Need
    over: asyncio.Future[None]
    decode: WorkerId | None
    prefill_active: bool = False
    decode_active: bool = False
    accepted: bool = False
    transfer: str = ""  # kv_transfer_params
    refused: set[Instance] = field(default_factory=set[Instance])
    held: list[TokensOut] = field(default_factory=list[TokensOut])
    early: list[TokensOut] = field(default_factory=list[TokensOut])
    beams: dict[int, TokensOut] = field(default_factory=dict[int, TokensOut])
    prefill_gone: bool = False  # nothing more comes from the P

    @property
    def remote(self) -> bool:
        """Whether a handoff belongs to it."""
        return self.decision.path is Path.REMOTE

    @property
    def hands_over(self) -> bool:
        """Whether the P keeps the KV for a D."""
        return self.decision.path in (Path.REMOTE, Path.EXPORTED)

    def fail(self, error: Exception) -> None:
        """End it with an error; the first end counts."""
        if not self.over.done():
            self.over.set_exception(error)

    def close(self) -> list[WorkerId]:
        """It is over, however it went; whose work on it is to be aborted. Idempotent.

        The D first: else it hears from the P that the transfer is gone, and begins to recompute.
        """
        ends = (
            (self.decode_active, self.decode),
            (self.prefill_active, self.decision.prefill),
        )
        self.prefill_active = self.decode_active = False
        if not self.over.cancel() and not self.over.cancelled():
            self.over.exception()  # looked at, so that asyncio does not warn
        return [worker_id for active, worker_id in ends if active and worker_id is not None]

    def finish(self) -> None:
        """End it well; the first end counts."""
        if not self.over.done():
            self.over.set_result(None)


def attempt_request(
    job: Job,
    output: Output,
    path: Path,
    attempt: int,
    *,
    deadline_s: float | None,
    lease_ms: int,
) -> GenerationRequest:
    """What the workers of an attempt are given: all that has come out already belongs to it."""
    params = job.params
    if params.prompt_logprobs is not None and output.scores.complete:
        params = replace(params, prompt_logprobs=None)
    exported = path is Path.EXPORTED
    return GenerationRequest(
        request_id=job.request_id,
        prompt_ids=job.prompt_ids,
        params=computed(params) if exported else params,
        output_ids=tuple(tuple(c.token_ids) for c in output.choices) if output.emitted else (),
        attempt=attempt,
        finished=tuple(choice.index for choice in output.choices if choice.finished),
        cache_salt=job.cache_salt,
        deadline_s=deadline_s,
        priority=job.priority,
        redraw=path is Path.ADOPTED,
        lease_ms=lease_ms if exported else None,
    )


def error_of(kind: str, message: str, param: str = "") -> ServingError:
    """The error that a worker named (a class of contracts.errors), with the field at fault."""
    cls = getattr(contracts.errors, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, ServingError)):
        return EngineFailure(f"{kind}: {message}")
    if issubclass(cls, InvalidRequest | NotFound):
        return cls(message, param or None)
    try:
        return cls(message)
    except TypeError:  # a class with arguments of its own
        return contracts.errors.Overloaded(message)


def is_hopeless(error: ServingError) -> bool:
    """Whether no other worker would do better."""
    return isinstance(error, InvalidRequest | UnsupportedModel)
