"""What a worker tells a router, one frame per engine step."""

from dataclasses import dataclass
from enum import StrEnum

from contracts.ids import RequestId


class FinishReason(StrEnum):
    """Why a choice ended."""

    STOP = "stop"  # an end token or a stop string
    LENGTH = "length"  # max_tokens or the context's end
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a drawn token and of the best alternatives, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob)


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """A prompt token's natural-log probability, its rank (1 is best) and the best, best first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob)


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of the prompt tokens at `position` and after; the first token has none.

    A prompt that is computed again repeats them.
    """

    request_id: RequestId
    attempt: int
    position: int
    entries: tuple[PromptLogprob, ...]


@dataclass(slots=True, unsafe_hash=True)  # not frozen, which makes it four times as dear to make
class TokensOut:
    """New tokens of one choice. `position` is that of the first of them (0 = first output).

    Never changed once made, like all messages here; a step makes one for each sequence.
    Beams say nothing until all are known: then one message a choice, best first, with `finish`.
    What P found for them comes as position 0 of choice 0, with the candidates as its `logprobs`.
    """

    request_id: RequestId
    attempt: int
    choice: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """P has scheduled the first chunk and holds all blocks: the handoff's params exist.

    `kv_transfer_params` is a JSON object as text; empty when no handoff follows (local path).
    """

    request_id: RequestId
    attempt: int
    kv_transfer_params: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Adopted:
    """D's answer to an Adopt, given at once."""

    request_id: RequestId
    attempt: int
    accepted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PathTaken:
    """How D came by the prompt's KV: `remote`, `local` or `recomputed` (with the cause).

    The figures are those of the handoff's reads; blocks in D's own cache are not read.
    """

    request_id: RequestId
    attempt: int
    path: str
    cause: str = ""
    num_bytes: int = 0
    num_descriptors: int = 0
    read_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The worker gives the request up. `kind` is a class name of contracts.errors."""

    request_id: RequestId
    attempt: int
    kind: str
    message: str
    param: str = ""  # the request's field that is at fault, if one is


WorkerEvent = TokensOut | PromptScores | PrefillStarted | Adopted | PathTaken | RequestFailed


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker reports with every frame and beat.

    `free` to `quarantined` are the ledger: its blocks by state, all of one moment. They add up to
    `total_blocks`. The transfers are those of a P since its start: with a lease that ran out, and
    taken back because a prefill lacked memory (L6). `offload_free` to `offload_loading` are the
    blocks of host memory by state; the bytes are those moved there and back since the start.
    """

    step: int = 0
    waiting: int = 0  # requests not yet running (queue and pending handoffs)
    running: int = 0
    waiting_tokens: int = 0  # prompt tokens still to be computed
    free_blocks: int = 0  # free and evictable
    total_blocks: int = 0
    draining: bool = False
    free: int = 0
    cached: int = 0
    owned: int = 0
    leased: int = 0
    reserved: int = 0
    quarantined: int = 0
    expired_transfers: int = 0
    revoked_transfers: int = 0
    offload_free: int = 0
    offload_cached: int = 0
    offload_loading: int = 0
    offloaded_bytes: int = 0
    loaded_bytes: int = 0
