"""What values request fields may have: all that can be refused before the prompt is built."""

import math
import re

from contracts.errors import InvalidRequest
from router.config import RouterConfig
from router.schema import ChatRequest, SharedFields

_SALT_CHARS = 128
_SALT_FORBIDDEN = frozenset("@/\\\0")
_MAX_WORDS = 128  # bad words, before and after tokenisation
_WORD_CHARS = 1000
_MAX_PROCESSORS = 16
_RESERVED_XARG = "kv_transfer_params"
_TOKEN_ID = re.compile(r"[0-9]{1,10}", re.ASCII)

REPETITION = (1e-30, 1e30)  # beyond: no longer a number once a logit was scaled by it
_BEAM_LENGTH = 40.0  # |length_penalty|; beyond: length**length_penalty overflows
_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": REPETITION,
    "length_penalty": (-_BEAM_LENGTH, _BEAM_LENGTH),
}
_WITHOUT_BEAMS = {  # what beam search cannot honour, with the values that change nothing
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": ({},),
    "stop": ([],),
    "stop_token_ids": ([],),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "structured_outputs": (),
}


def check_ranges(request: SharedFields, config: RouterConfig, vocab_size: int) -> None:
    """Check each field alone, and those that depend on one another.

    Raises:
        InvalidRequest: names the field and its limit.
    """
    for name, (low, high) in _RANGES.items():
        _in_range(name, getattr(request, name), low, high)
    if request.top_p == 0.0:
        raise InvalidRequest("top_p must be greater than 0 and at most 1", "top_p")
    if request.top_k is not None and request.top_k < -1:
        raise InvalidRequest("top_k must be -1, 0 (off) or at least 1", "top_k")
    if request.n is not None and not 1 <= request.n <= config.max_n:
        raise InvalidRequest(f"n must be between 1 and {config.max_n}", "n")
    for name, limit in request.limits:
        if limit is not None and limit < 1:
            raise InvalidRequest(f"{name} must be at least 1", name)
    if request.min_tokens is not None and request.min_tokens < 0:
        raise InvalidRequest("min_tokens must not be negative", "min_tokens")
    if request.truncate_prompt_tokens is not None and request.truncate_prompt_tokens < -1:
        raise InvalidRequest("truncate_prompt_tokens must be at least -1", "truncate_prompt_tokens")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream: true", "stream_options")
    _check_stops(request, config)
    _check_token_ids(request, vocab_size)
    _check_words(request)
    _check_logprobs(request, config, vocab_size)
    _check_processors(request, config)
    _check_salt(request.cache_salt)
    if request.use_beam_search:
        _check_beams(request, config, vocab_size)


def _in_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{name} must be between {low:g} and {high:g}", name)


def _check_stops(request: SharedFields, config: RouterConfig) -> None:
    stops = request.stop or []
    if len(stops) > config.max_stop:
        raise InvalidRequest(f"stop takes at most {config.max_stop} strings", "stop")
    if "" in stops:
        raise InvalidRequest("stop must not hold an empty string", "stop")


def _check_token_ids(request: SharedFields, vocab_size: int) -> None:
    for name in ("stop_token_ids", "allowed_token_ids"):
        ids: list[int] | None = getattr(request, name)
        if any(not 0 <= i < vocab_size for i in ids or ()):
            raise InvalidRequest(f"{name} must be token ids from 0 to {vocab_size - 1}", name)
    if request.allowed_token_ids is not None and not request.allowed_token_ids:
        raise InvalidRequest("allowed_token_ids must not be empty", "allowed_token_ids")
    for key, value in (request.logit_bias or {}).items():
        if not _TOKEN_ID.fullmatch(key) or int(key) >= vocab_size:
            raise InvalidRequest(
                f"logit_bias must have token ids from 0 to {vocab_size - 1} as keys", "logit_bias"
            )
        if not math.isfinite(value):
            raise InvalidRequest("logit_bias must have finite numbers as values", "logit_bias")


def _check_words(request: SharedFields) -> None:
    words = request.bad_words or []
    if len(words) > _MAX_WORDS:
        raise InvalidRequest(f"bad_words takes at most {_MAX_WORDS} words", "bad_words")
    if "" in words:
        raise InvalidRequest("bad_words must not hold an empty string", "bad_words")
    if any(len(word) > _WORD_CHARS for word in words):
        raise InvalidRequest(f"bad_words may have {_WORD_CHARS} characters each", "bad_words")


def _check_logprobs(request: SharedFields, config: RouterConfig, vocab_size: int) -> None:
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    field = "top_logprobs" if isinstance(request, ChatRequest) else "logprobs"
    _check_alternatives(request.wanted_logprobs, field, "logprobs", config, vocab_size)
    name = "prompt_logprobs"
    _check_alternatives(request.prompt_logprobs, name, name, config, vocab_size)
    if request.stream and request.prompt_logprobs:
        raise InvalidRequest("prompt_logprobs are not available with stream: true", name)


def _check_alternatives(
    count: int | None, name: str, cap_name: str, config: RouterConfig, vocab_size: int
) -> None:
    if count is None:
        return
    if count < -1:
        raise InvalidRequest(f"{name} must not be negative (-1: the whole vocabulary)", name)
    wanted = vocab_size if count == -1 else count
    if wanted > config.max_logprobs != -1:
        raise InvalidRequest(
            f"{name} asks for {wanted} alternatives, but at most {config.max_logprobs} are allowed",
            cap_name,
        )


def _check_processors(request: SharedFields, config: RouterConfig) -> None:
    processors = request.logits_processors or []
    if processors and not config.logits_processor_pattern:
        raise InvalidRequest("this server allows no logits_processors", "logits_processors")
    if len(processors) > _MAX_PROCESSORS:
        raise InvalidRequest(
            f"logits_processors takes at most {_MAX_PROCESSORS}", "logits_processors"
        )
    for processor in processors:
        if not re.fullmatch(config.logits_processor_pattern, processor.qualname):
            raise InvalidRequest(
                f"logits_processors: {processor.qualname[:80]!r} is not among the allowed names",
                "logits_processors",
            )
    if _RESERVED_XARG in (request.vllm_xargs or {}):
        raise InvalidRequest(f"vllm_xargs must not hold {_RESERVED_XARG}", "vllm_xargs")


def _check_salt(salt: str | None) -> None:
    if salt is None:
        return
    if not 1 <= len(salt) <= _SALT_CHARS:
        raise InvalidRequest(f"cache_salt must have 1 to {_SALT_CHARS} characters", "cache_salt")
    if _SALT_FORBIDDEN & set(salt):
        raise InvalidRequest("cache_salt must not hold @, /, \\ or NUL", "cache_salt")


def _check_beams(request: SharedFields, config: RouterConfig, vocab_size: int) -> None:
    candidates = 2 * (request.n or 1)
    cap = vocab_size if config.max_logprobs == -1 else min(config.max_logprobs, vocab_size)
    if candidates > cap:
        raise InvalidRequest(
            f"beam search of width n needs 2n candidates a step, but at most {cap} are allowed", "n"
        )
    for name, neutral in _WITHOUT_BEAMS.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            raise InvalidRequest(f"{name} cannot be used with use_beam_search", name)
    if request.response_format is not None and request.response_format.type != "text":
        raise InvalidRequest(
            "response_format cannot be used with use_beam_search", "response_format"
        )
