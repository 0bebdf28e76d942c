import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ConfigurationError, InvalidRequest
from router.config import RouterConfig
from router.http_errors import MalformedRequest
from tests.support.router_params import CONTEXT, PROMPT, VOCABULARY, make_config, params

BEAMS: dict[str, Any] = {"use_beam_search": True}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RouterConfig:
    return make_config(tmp_path_factory.mktemp("model"))


# Ranges

OUT_OF_RANGE: list[tuple[dict[str, Any], str]] = [
    *(({name: math.nan}, name) for name in ("temperature", "top_p", "min_p", "length_penalty")),
    *(({name: math.inf}, name) for name in ("temperature", "repetition_penalty", "length_penalty")),
    *(({f"{kind}_penalty": 2.1}, f"{kind}_penalty") for kind in ("frequency", "presence")),
    *(({f"{kind}_penalty": -2.1}, f"{kind}_penalty") for kind in ("frequency", "presence")),
    *(({f"{kind}_penalty": "nan"}, f"{kind}_penalty") for kind in ("frequency", "presence")),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": -0.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": -0.01}, "min_p"),
    ({"min_p": 1.01}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": -1}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 21}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"n": 11, **BEAMS}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": CONTEXT + 1}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_completion_tokens": CONTEXT + 1, "max_tokens": 3}, "max_completion_tokens"),
    ({"max_tokens": 0, "max_completion_tokens": 3}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
    ({"min_tokens": CONTEXT - PROMPT + 1}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [3, VOCABULARY]}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
    *(
        ({"logit_bias": {key: 1}}, "logit_bias")
        for key in (str(VOCABULARY), "-1", "x", "", "1.0", "1_0", " 1", "\u0661", "9" * 5000)
    ),
    ({"logit_bias": {"1": math.nan}}, "logit_bias"),
    ({"logit_bias": {"1": math.inf}}, "logit_bias"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": ["x" * 1001]}, "bad_words"),
    ({"bad_words": ["x"] * 129}, "bad_words"),
    ({"bad_words": [chr(50 + i % 40) * (2 + i // 40) for i in range(100)]}, "bad_words"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
    ({"top_logprobs": -1}, "top_logprobs"),
    ({"top_logprobs": -2, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "logprobs"),
    ({"top_logprobs": -1, "logprobs": True}, "logprobs"),
    ({"prompt_logprobs": -2}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 129}, "cache_salt"),
    *(({"cache_salt": f"a{char}b"}, "cache_salt") for char in "@/\\\0"),
    ({"logits_processors": ["bad.name"]}, "logits_processors"),
    ({"logits_processors": ["good.name.more"]}, "logits_processors"),
    ({"logits_processors": ["good.a", {"qualname": "x"}]}, "logits_processors"),
    ({"logits_processors": ["good.a"] * 17}, "logits_processors"),
    ({"logits_processors": [{"qualname": "good.a", "args": [math.nan]}]}, "logits_processors"),
    ({"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs"),
    *(
        ({name: value, **BEAMS}, name)
        for name, value in {
            "frequency_penalty": 0.5,
            "presence_penalty": -0.5,
            "repetition_penalty": 1.1,
            "logit_bias": {"1": 0},
            "stop": "a",
            "stop_token_ids": [3],
            "min_tokens": 1,
            "bad_words": ["a"],
            "allowed_token_ids": [3],
            "logits_processors": ["good.a"],
            "structured_outputs": {"regex": "a"},
            "response_format": {"type": "json_object"},
        }.items()
    ),
]


@pytest.mark.parametrize(("fields", "param"), OUT_OF_RANGE, ids=lambda value: str(value)[:60])
def test_out_of_range(config: RouterConfig, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        params(config, **fields)
    assert caught.value.param == param
    assert param in str(caught.value)
    assert len(str(caught.value)) < 200
    assert not isinstance(caught.value, MalformedRequest)


def test_no_processors_without_a_pattern(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="allows no logits_processors"):
        params(make_config(tmp_path, logits_processor_pattern=""), logits_processors=["a.b"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"logits_processor_pattern": "("}, "logits_processor_pattern"),
        ({"generation_config": "/nowhere"}, "generation_config"),
        ({"max_logprobs": -2}, "max_logprobs"),
        ({"max_batch": 0}, "max_batch"),
    ],
)
def test_settings_are_checked_at_start(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named):
        make_config(tmp_path, **settings)


# Anything at all

NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([2**63 - 1, -(2**63), math.nan, math.inf, 1e300, 5e-324, "nan", "1e999"]),
)
NUMERIC = """temperature top_p top_k min_p seed n max_tokens max_completion_tokens min_tokens
frequency_penalty presence_penalty repetition_penalty length_penalty top_logprobs prompt_logprobs
truncate_prompt_tokens priority"""
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            NUMERIC.split(),
            NUMBERS,
        ),
        **dict.fromkeys(
            ["use_beam_search", "ignore_eos", "echo", "stream", "logprobs"], st.booleans()
        ),
        "logit_bias": st.dictionaries(st.text(max_size=3) | st.just("5"), NUMBERS, max_size=2),
        "stop": st.lists(st.text(max_size=3), max_size=5),
        "stop_token_ids": st.lists(NUMBERS, max_size=2),
        "allowed_token_ids": st.lists(NUMBERS, max_size=2),
        "bad_words": st.lists(st.text(max_size=3), max_size=3),
        "cache_salt": st.text(max_size=3),
        "vllm_xargs": st.dictionaries(st.text(max_size=3), NUMBERS | st.lists(NUMBERS)),
    },
)


@given(fields=FIELDS)
def test_anything_is_resolved_within_bounds_or_refused(
    config: RouterConfig, fields: dict[str, Any]
) -> None:
    try:
        got = params(config, **fields)
    except InvalidRequest:
        return
    assert 1 <= got.max_tokens <= CONTEXT - PROMPT
    assert 0 <= got.min_tokens <= got.max_tokens
    assert 0 <= got.seed < 2**64
    assert 1 <= got.n <= 20
    assert got.temperature == 0.0 or 0.01 <= got.temperature <= 2.0
    assert 0.0 < got.top_p <= 1.0
    assert 0 <= got.top_k < 2**31
    assert 0 < got.repetition_penalty < math.inf
    assert all(0 <= i < VOCABULARY and abs(value) <= 100 for i, value in got.logit_bias)
