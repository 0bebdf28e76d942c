"""A request as it travels between router and workers."""

from dataclasses import dataclass, field

from contracts.ids import RequestId
from contracts.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """All a worker needs to compute a request alone (protocol notes, section 9).

    `output_ids` holds, per choice, the tokens already emitted (empty for a fresh request): the
    sampler's position, limits and ends all derive from them, so a replay is an ordinary request.
    `deadline_s` is the time left when the message is sent; None: no limit. Lower `priority` goes
    first in every queue. `redraw` tells a D to draw the first token itself, from a prompt whose KV
    it is handed (the two-step protocol); `lease_ms` is how long P then keeps the KV for it.
    """

    request_id: RequestId
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    output_ids: tuple[tuple[int, ...], ...] = field(default=())
    attempt: int = 0
    finished: tuple[int, ...] = ()  # choices that are over already (a replay leaves them out)
    cache_salt: str = field(default="", repr=False)  # a secret of its client
    deadline_s: float | None = None
    priority: int = 0  # signed 64 bit
    redraw: bool = False
    lease_ms: int | None = None  # None: the worker's own
