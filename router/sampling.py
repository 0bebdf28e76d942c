"""From checked fields to SamplingParams: ranges, model defaults, the room that is left."""

import math
import secrets
from typing import TypeVar

from contracts.errors import InvalidRequest
from contracts.sampling import SamplingParams
from router.config import RouterConfig
from router.model_files import ModelDefaults
from router.schema import ChatRequest

_GREEDY_BELOW = 1e-5
_LOWEST_TEMPERATURE = 0.01
_MASK_64 = 2**64 - 1
_MAX_TOP_K = 2**31 - 1

_T = TypeVar("_T")


def check_ranges(request: ChatRequest, config: RouterConfig, vocab_size: int) -> None:
    """Everything that can be refused before the prompt is tokenised.

    Raises:
        InvalidRequest: names the field and its limit.
    """
    _in_range("temperature", request.temperature, 0.0, 2.0)
    _in_range("top_p", request.top_p, 0.0, 1.0)
    if request.top_p == 0.0:
        raise InvalidRequest("top_p must be greater than 0 and at most 1", "top_p")
    if request.top_k is not None and request.top_k < -1:
        raise InvalidRequest("top_k must be -1, 0 (off) or at least 1", "top_k")
    if request.n is not None and not 1 <= request.n <= config.max_n:
        raise InvalidRequest(f"n must be between 1 and {config.max_n}", "n")
    for name in ("max_tokens", "max_completion_tokens"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise InvalidRequest(f"{name} must be at least 1", name)
    stops = request.stop or []
    if len(stops) > config.max_stop:
        raise InvalidRequest(f"stop takes at most {config.max_stop} strings", "stop")
    if "" in stops:
        raise InvalidRequest("stop must not hold an empty string", "stop")
    if any(not 0 <= i < vocab_size for i in request.stop_token_ids or []):
        raise InvalidRequest(
            f"stop_token_ids must be token ids from 0 to {vocab_size - 1}", "stop_token_ids"
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream: true", "stream_options")
    _check_logprobs(request, config)


def _check_logprobs(request: ChatRequest, config: RouterConfig) -> None:
    top = request.top_logprobs or 0
    if top < -1:
        raise InvalidRequest("top_logprobs must not be negative", "top_logprobs")
    if top and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    if top == -1 or top > config.max_top_logprobs:
        raise InvalidRequest(
            f"top_logprobs must be at most {config.max_top_logprobs}",
            "logprobs" if top > 0 else "top_logprobs",
        )


def resolve(
    request: ChatRequest,
    defaults: ModelDefaults,
    *,
    num_prompt_tokens: int,
    max_model_len: int,
    eos_ids: tuple[int, ...],
) -> SamplingParams:
    """Resolve every default. The ranges were checked.

    Raises:
        InvalidRequest: an output limit beyond the context, or several greedy samples.
    """
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    n = _first(request.n, 1)
    greedy = temperature < _GREEDY_BELOW
    if greedy and n > 1:
        raise InvalidRequest("n must be 1 with greedy sampling (temperature 0)", "n")
    seed = request.seed
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return SamplingParams(
        max_tokens=_max_tokens(request, defaults, num_prompt_tokens, max_model_len),
        temperature=0.0 if greedy else max(temperature, _LOWEST_TEMPERATURE),
        top_p=1.0 if greedy else _first(request.top_p, defaults.top_p, 1.0),
        top_k=0 if greedy else min(max(_first(request.top_k, defaults.top_k, 0), 0), _MAX_TOP_K),
        seed=secrets.randbits(64) if seed is None or seed == -1 else seed & _MASK_64,
        n=n,
        eos_token_ids=() if request.ignore_eos else eos_ids,
        stop_token_ids=tuple(dict.fromkeys(request.stop_token_ids or ())),
        logprobs=logprobs,
    )


def _max_tokens(
    request: ChatRequest, defaults: ModelDefaults, num_prompt_tokens: int, max_model_len: int
) -> int:
    room = max_model_len - num_prompt_tokens
    for name in ("max_completion_tokens", "max_tokens"):
        value: int | None = getattr(request, name)
        if value is not None:
            if value > max_model_len:
                raise InvalidRequest(
                    f"{name} is {value}, but the model's context is {max_model_len} tokens", name
                )
            return min(value, room)
    return min(_first(defaults.max_tokens, room), room)


def _in_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{name} must be between {low:g} and {high:g}", name)


def _first(*values: _T | None) -> _T:
    """The first value that is not None; the last one never is."""
    for value in values:
        if value is not None:
            return value
    raise AssertionError("no default given")
