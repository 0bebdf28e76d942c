import json
import math
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import InvalidRequest
from contracts.sampling import SamplingParams
from router.body import check_media_type, parse_object
from router.config import RouterConfig
from router.http_errors import MalformedRequest
from router.model_files import ModelDefaults
from router.sampling import check_ranges, resolve
from router.schema import NEUTRAL, ChatRequest, parse_chat_request

DOCUMENTED = """messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens
max_completion_tokens n presence_penalty response_format seed stop stream stream_options
temperature top_p tools tool_choice reasoning_effort include_reasoning parallel_tool_calls
user use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids
include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
spaces_between_special_tokens truncate_prompt_tokens prompt_logprobs allowed_token_ids
bad_words echo add_generation_prompt continue_final_message add_special_tokens documents
chat_template chat_template_kwargs mm_processor_kwargs structured_outputs priority
request_id logits_processors return_tokens_as_token_ids return_token_ids cache_salt
kv_transfer_params vllm_xargs"""
MESSAGES = [{"role": "user", "content": "hi"}]
VOCABULARY = 100
CONTEXT = 50
PROMPT = 10


@pytest.fixture
def config(tmp_path: Path) -> RouterConfig:
    return RouterConfig(model_path=str(tmp_path), served_model_name="m", cluster_key="k", max_n=8)


def parse(**fields: Any) -> ChatRequest:
    return parse_chat_request({"messages": MESSAGES, **fields})


def params(
    config: RouterConfig, *, defaults: ModelDefaults | None = None, **fields: Any
) -> SamplingParams:
    request = parse(**fields)
    check_ranges(request, config, VOCABULARY)
    return resolve(
        request,
        defaults or ModelDefaults(),
        num_prompt_tokens=PROMPT,
        max_model_len=CONTEXT,
        eos_ids=(1, 2),
    )


# Types


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", "hi"),
        ("messages", ["hi"]),
        ("temperature", "warm"),
        ("temperature", True),
        ("temperature", [1]),
        ("n", 1.5),
        ("n", False),
        ("max_tokens", {}),
        ("top_k", "many"),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 0.5),
        ("stop", 3),
        ("stop", ["a", 3]),
        ("stream", "yes"),
        ("stream", 1),
        ("logprobs", 5),
        ("stream_options", True),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", 3),
        ("user", 3),
        ("request_id", 3),
        ("request_id", "x" * 2000),
        ("model", ["m"]),
        ("ignore_eos", "true"),
        ("max_tokens", math.nan),
    ],
)
def test_wrong_types_name_the_field(field: str, value: object) -> None:
    with pytest.raises(MalformedRequest) as caught:
        parse_chat_request({"messages": MESSAGES, field: value})
    assert caught.value.param is not None
    assert caught.value.param.split(".")[:2] == ["body", field]
    assert len(str(caught.value)) < 300


def test_messages_are_required() -> None:
    with pytest.raises(MalformedRequest, match=r"body\.messages"):
        parse_chat_request({})


def test_null_is_absent_for_every_field() -> None:
    fields = [*ChatRequest.model_fields, *NEUTRAL]
    nulls = dict.fromkeys(fields, None)
    assert parse_chat_request({**nulls, "messages": MESSAGES}) == parse()


def test_integral_floats_and_numeric_texts_are_integers(config: RouterConfig) -> None:
    got = params(config, max_tokens=5.0, n="2", temperature="0.5", seed=3.0)
    assert (got.max_tokens, got.n, got.temperature, got.seed) == (5, 2, 0.5, 3)


def test_unknown_fields_are_ignored_at_every_level() -> None:
    got = parse(
        foo={"bar": [math.nan]},
        stream=True,
        stream_options={"include_usage": True, "other": 1},
    )
    assert got.stream_options is not None
    assert got.stream_options.include_usage


# What is not supported yet

NOT_NEUTRAL: dict[str, object] = {
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "repetition_penalty": 1.1,
    "min_p": 0.1,
    "logit_bias": {"1": 5},
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "logits_processors": ["a.b"],
    "vllm_xargs": {"a": 1},
    "use_beam_search": True,
    "length_penalty": 2,
    "min_tokens": 1,
    "include_stop_str_in_output": True,
    "prompt_logprobs": 0,
    "echo": True,
    "return_tokens_as_token_ids": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": True,
    "chat_template": "x",
    "chat_template_kwargs": {"enable_thinking": False},
    "documents": [{"text": "x"}],
    "mm_processor_kwargs": {"a": 1},
    "truncate_prompt_tokens": 5,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "include_reasoning": False,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "priority": 1,
    "cache_salt": "salt",
    "kv_transfer_params": {"do_remote_decode": True},
}


@pytest.mark.parametrize("field", sorted(NEUTRAL))
def test_fields_not_supported_yet_are_refused_by_name(field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field} is not supported yet$") as caught:
        parse(**{field: NOT_NEUTRAL[field]})
    assert caught.value.param == field


def test_neutral_values_pass() -> None:
    for field, values in NEUTRAL.items():
        for value in values:
            parse(**{field: value})
    parse(response_format={"type": "text", "json_schema": None}, frequency_penalty=0.0)


def test_every_field_of_the_api_document_is_known() -> None:
    documented = set(DOCUMENTED.split())
    supported = set(ChatRequest.model_fields)
    assert supported | NEUTRAL.keys() == documented
    assert not supported & NEUTRAL.keys()


def test_false_is_not_zero() -> None:
    with pytest.raises(InvalidRequest):
        parse(min_tokens=False)


# Ranges


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": CONTEXT + 1}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_completion_tokens": CONTEXT + 1, "max_tokens": 3}, "max_completion_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": -2, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
    ],
)
def test_out_of_range(config: RouterConfig, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        params(config, **fields)
    assert caught.value.param == param
    assert not isinstance(caught.value, MalformedRequest)


# Resolved values


def test_defaults(config: RouterConfig) -> None:
    got = params(config)
    assert (got.temperature, got.top_p, got.top_k, got.n) == (1.0, 1.0, 0, 1)
    assert got.max_tokens == CONTEXT - PROMPT
    assert got.eos_token_ids == (1, 2)
    assert got.logprobs is None


def test_model_defaults_yield_to_the_request(config: RouterConfig) -> None:
    defaults = ModelDefaults(temperature=0.6, top_p=0.9, top_k=20, max_tokens=7)
    got = params(config, defaults=defaults)
    assert (got.temperature, got.top_p, got.top_k, got.max_tokens) == (0.6, 0.9, 20, 7)
    got = params(config, defaults=defaults, temperature=1, top_p=1, top_k=0, max_tokens=8)
    assert (got.temperature, got.top_p, got.top_k, got.max_tokens) == (1.0, 1.0, 0, 8)


@pytest.mark.parametrize(
    ("given", "used"), [(0, 0.0), (1e-6, 0.0), (1e-4, 0.01), (0.01, 0.01), (2, 2.0)]
)
def test_temperature(config: RouterConfig, given: float, used: float) -> None:
    got = params(config, temperature=given, top_p=0.5, top_k=3)
    assert got.temperature == used
    assert (got.top_p, got.top_k) == ((1.0, 0) if used == 0.0 else (0.5, 3))


def test_output_limit(config: RouterConfig) -> None:
    assert params(config, max_tokens=3, max_completion_tokens=4).max_tokens == 4
    assert params(config, max_tokens=CONTEXT).max_tokens == CONTEXT - PROMPT


def test_seeds(config: RouterConfig) -> None:
    assert params(config, seed=5).seed == 5
    assert params(config, seed=-5).seed == 2**64 - 5
    assert params(config, seed=-(2**63)).seed == 2**63
    drawn = {params(config, seed=seed).seed for seed in (None, -1, None, -1)}
    assert len(drawn) == 4


def test_ignore_eos_keeps_stop_token_ids(config: RouterConfig) -> None:
    got = params(config, ignore_eos=True, stop_token_ids=[1, 5, 5])
    assert got.eos_token_ids == ()
    assert got.stop_token_ids == (1, 5)


def test_logprobs(config: RouterConfig) -> None:
    assert params(config, logprobs=True).logprobs == 0
    assert params(config, logprobs=True, top_logprobs=3).logprobs == 3
    assert params(config, logprobs=True, top_logprobs=None).logprobs == 0


def test_top_k_off(config: RouterConfig) -> None:
    assert params(config, top_k=-1).top_k == 0
    assert params(config, top_k=10**12).top_k >= VOCABULARY


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"seed":' + b"9" * 5000 + b"}",
        b'{"model":"\\ud800"}',
        b'{"model":"\\uDC00x"}',
    ],
    ids=range(11),
)
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with pytest.raises(MalformedRequest):
        parse_object(body)


def test_escaped_pairs_are_fine() -> None:
    assert parse_object(b'{"a":"\\ud83d\\ude42"}') == {"a": "🙂"}
    assert parse_object(json.dumps({"a": "🙂"}).encode()) == {"a": "🙂"}


@pytest.mark.parametrize("value", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_media_types(value: str) -> None:
    check_media_type(value)


@pytest.mark.parametrize("value", [None, "", "text/plain", "multipart/form-data; boundary=x"])
def test_other_media_types(value: str | None) -> None:
    with pytest.raises(MalformedRequest):
        check_media_type(value)
