"""From checked fields to SamplingParams: model defaults, the room that is left, token sequences."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from contracts.errors import InvalidRequest
from contracts.sampling import Grammar, ProcessorSpec, SamplingParams
from router.json_text import dump_json
from router.model_files import ModelDefaults
from router.schema import SharedFields

_GREEDY_BELOW = 1e-5
_LOWEST_TEMPERATURE = 0.01
_LARGEST_BIAS = 100.0
_MASK_64 = 2**64 - 1
_MAX_TOP_K = 2**31 - 1
_MAX_BAD_SEQUENCES = 128

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What resolving needs to know of the model.

    `eos_ids` are all its end tokens, the tokenizer's own first. `tokenize` gives the token ids of
    a text as it is, nothing added. `special_ids` are the tokens that leave no text by default.
    """

    vocab_size: int
    eos_ids: tuple[int, ...]
    tokenize: Callable[[str], tuple[int, ...]]
    defaults: ModelDefaults = ModelDefaults()  # noqa: RUF009 - frozen
    special_ids: frozenset[int] = frozenset()


def resolve(
    request: SharedFields,
    model: ServedModel,
    *,
    num_prompt_tokens: int,
    max_model_len: int,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """Resolve every default. The ranges were checked.

    Raises:
        InvalidRequest: an output limit beyond the context, several greedy samples, or bad words
            that are too many once they are token ids.
    """
    max_tokens = _max_tokens(request, model.defaults, num_prompt_tokens, max_model_len)
    shared = SamplingParams(
        max_tokens=max_tokens,
        n=_first(request.n, 1),
        eos_token_ids=() if request.ignore_eos else model.eos_ids,
        logprobs=_alternatives(request.wanted_logprobs, model.vocab_size),
        prompt_logprobs=_alternatives(
            None if request.stream else request.wanted_prompt_logprobs, model.vocab_size
        ),
    )
    if request.use_beam_search:
        return replace(shared, beam=True, length_penalty=_first(request.length_penalty, 1.0))
    return _resolve_draws(request, model, shared, grammar)


def _resolve_draws(
    request: SharedFields, model: ServedModel, shared: SamplingParams, grammar: Grammar | None
) -> SamplingParams:
    """What there is to resolve without beams."""
    defaults = model.defaults
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    greedy = temperature < _GREEDY_BELOW
    if greedy and shared.n > 1:
        raise InvalidRequest("n must be 1 with greedy sampling (temperature 0)", "n")
    top_k = _first(request.top_k, defaults.top_k, 0)
    stop_token_ids = tuple(dict.fromkeys(request.stop_token_ids or ()))
    min_tokens = _min_tokens(request, shared.max_tokens)
    seed = request.seed
    return replace(
        shared,
        temperature=0.0 if greedy else max(temperature, _LOWEST_TEMPERATURE),
        top_p=1.0 if greedy else _first(request.top_p, defaults.top_p, 1.0),
        top_k=0 if greedy else min(max(top_k, 0), _MAX_TOP_K),
        min_p=0.0 if greedy else _first(request.min_p, defaults.min_p, 0.0),
        seed=secrets.randbits(64) if seed is None or seed == -1 else seed & _MASK_64,
        stop_token_ids=stop_token_ids,
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        frequency_penalty=_first(request.frequency_penalty, defaults.frequency_penalty, 0.0),
        presence_penalty=_first(request.presence_penalty, defaults.presence_penalty, 0.0),
        min_tokens=min_tokens,
        min_tokens_masked=(
            tuple(dict.fromkeys((*model.eos_ids, *stop_token_ids))) if min_tokens else ()
        ),
        logit_bias=_logit_bias(request),
        allowed_token_ids=tuple(dict.fromkeys(request.allowed_token_ids or ())),
        bad_words=_bad_words(request.bad_words or (), model),
        grammar=grammar,
        processors=_processors(request),
        extra_args=dump_json(request.vllm_xargs, "vllm_xargs") if request.vllm_xargs else "",
    )


def _max_tokens(
    request: SharedFields, defaults: ModelDefaults, num_prompt_tokens: int, max_model_len: int
) -> int:
    room = max_model_len - num_prompt_tokens
    for name, value in request.limits:
        if value is not None:
            if value > max_model_len:
                raise InvalidRequest(
                    f"{name} must be at most the model's context of {max_model_len} tokens", name
                )
            return min(value, room)
    return min(_first(defaults.max_tokens, room), room)


def _min_tokens(request: SharedFields, max_tokens: int) -> int:
    wanted = request.min_tokens or 0
    if wanted > max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most the output limit, here {max_tokens} tokens", "min_tokens"
        )
    return wanted


def _alternatives(count: int | None, vocab_size: int) -> int | None:
    return None if count is None else vocab_size if count == -1 else min(count, vocab_size)


def _logit_bias(request: SharedFields) -> tuple[tuple[int, float], ...]:
    """By token id; values beyond the limits are cut to them."""
    found = {int(key): value for key, value in (request.logit_bias or {}).items()}
    return tuple(
        (token_id, min(max(value, -_LARGEST_BIAS), _LARGEST_BIAS))
        for token_id, value in found.items()
        if value
    )


def _bad_words(words: Sequence[str], model: ServedModel) -> tuple[tuple[int, ...], ...]:
    """Each word as it begins a text and as it follows a blank.

    The second form counts only if it is as long as the first and begins otherwise: else it is the
    first one behind a token for the blank, which the first one catches.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        text = word.lstrip() or word
        bare, spaced = model.tokenize(text), model.tokenize(f" {text}")
        if not bare:
            raise InvalidRequest("bad_words holds a word without any token", "bad_words")
        found[bare] = None
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            found[spaced] = None
        if len(found) > _MAX_BAD_SEQUENCES:
            raise InvalidRequest(
                f"bad_words may come to {_MAX_BAD_SEQUENCES} token sequences at most", "bad_words"
            )
    if any(not 0 <= i < model.vocab_size for ids in found for i in ids):
        raise InvalidRequest("bad_words holds a word the model has no tokens for", "bad_words")
    return tuple(found)


def _processors(request: SharedFields) -> tuple[ProcessorSpec, ...]:
    name = "logits_processors"
    return tuple(
        ProcessorSpec(
            processor.qualname,
            None if processor.args is None else dump_json(processor.args, name),
            None if processor.kwargs is None else dump_json(processor.kwargs, name),
        )
        for processor in request.logits_processors or ()
    )


def _first(*values: _T | None) -> _T:
    """The first value that is not None; the last one never is."""
    for value in values:
        if value is not None:
            return value
    raise AssertionError("no default given")
