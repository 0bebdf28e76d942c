"""The one error tree. Each boundary maps it with one table (rpc.errors, router.http_errors).

ServingError
├── InvalidRequest         the caller's input is wrong; names the field (HTTP 400)
├── NotFound               no such model or path (404)
├── Overloaded             right request, wrong moment; retry after `retry_after_s` (429)
├── Unavailable            no worker can serve, or it is draining (503)
├── HandoffError           a KV handoff failed; D recomputes, the client never sees it
│   ├── TransferGone       the transfer ended, expired or was never there
│   ├── ClaimRefused       somebody else holds the claim, or the params do not fit
│   ├── FenceBroken        the generations differ: what was read is not what was exported
│   └── TransferFailed     the connector reports an error or a time-out
├── OutOfBlocks            the pool cannot give that many blocks now; nothing has changed
├── UnsupportedModel       this architecture cannot be served exactly; named at load
├── ConfigurationError     a setting or flag is wrong (the command ends with one line)
└── EngineFailure          our own fault (500)
"""


class ServingError(Exception):
    """Base of everything that is raised on purpose."""


class InvalidRequest(ServingError):
    """The request can never succeed as it is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotFound(ServingError):
    """No such model or path."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Overloaded(ServingError):
    """Correct request, wrong moment."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(ServingError):
    """Nobody can serve this now: no worker, a lost worker, or one that drains."""


class HandoffError(ServingError):
    """A KV handoff did not succeed. D recomputes the prompt."""


class TransferGone(HandoffError):
    """The transfer is over, expired, or unknown to P."""


class ClaimRefused(HandoffError):
    """P does not grant the claim: another claimer, another model, edited params."""


class FenceBroken(HandoffError):
    """The generation words differ from the claim's: the blocks changed hands."""


class TransferFailed(HandoffError):
    """The connector reported an error, or the read outlived its deadline."""


class OutOfBlocks(ServingError):
    """The pool cannot give `wanted` blocks; the pool is unchanged."""

    def __init__(self, wanted: int, available: int) -> None:
        super().__init__(f"{wanted} KV blocks wanted, {available} available")
        self.wanted = wanted
        self.available = available


class UnsupportedModel(ServingError):
    """The architecture cannot be served exactly."""


class ConfigurationError(ServingError):
    """A setting is wrong; the message says which and what to do."""


class EngineFailure(ServingError):
    """A fault of ours."""
