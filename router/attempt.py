"""One attempt of a request: which workers hold something for it, and how it ended."""

import asyncio
from dataclasses import dataclass, field

import contracts.errors
from contracts.errors import EngineFailure, InvalidRequest, ServingError, UnsupportedModel
from contracts.events import TokensOut
from contracts.ids import WorkerId
from contracts.request import GenerationRequest
from router.placement import Decision, Path


class WorkerFault(Exception):
    """An attempt ended by a worker's fault; another one may follow.

    `lost`: the session broke, so the worker itself may be fine.
    """

    def __init__(self, worker_id: WorkerId, error: ServingError, *, lost: bool = False) -> None:
        super().__init__(f"{worker_id}: {type(error).__name__}: {error}")
        self.worker_id = worker_id
        self.error = error
        self.lost = lost


class HandoffRefused(Exception):
    """No D takes the handoff."""


@dataclass(slots=True, eq=False)
class Attempt:
    """`prefill_active` and `decode_active`: that worker may still hold something for us.

    `decode` changes when a D refuses. `held` are P's tokens that wait for a D to accept.
    """

    request: GenerationRequest
    decision: Decision
    over: asyncio.Future[None]
    decode: WorkerId | None
    prefill_active: bool = False
    decode_active: bool = False
    accepted: bool = False
    transfer: str = ""  # kv_transfer_params
    refused: set[WorkerId] = field(default_factory=set[WorkerId])
    held: list[TokensOut] = field(default_factory=list[TokensOut])

    @property
    def remote(self) -> bool:
        """Whether a handoff belongs to it."""
        return self.decision.path is Path.REMOTE

    def fail(self, error: Exception) -> None:
        """End it with an error; the first end counts."""
        if not self.over.done():
            self.over.set_exception(error)

    def finish(self) -> None:
        """End it well; the first end counts."""
        if not self.over.done():
            self.over.set_result(None)


def error_of(kind: str, message: str) -> ServingError:
    """The error that a worker named (a class of contracts.errors)."""
    cls = getattr(contracts.errors, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, ServingError)):
        return EngineFailure(f"{kind}: {message}")
    try:
        return cls(message)
    except TypeError:  # a class with arguments of its own
        return contracts.errors.Overloaded(message)


def is_hopeless(error: ServingError) -> bool:
    """Whether no other worker would do better."""
    return isinstance(error, InvalidRequest | UnsupportedModel)
