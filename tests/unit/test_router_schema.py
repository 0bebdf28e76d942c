import logging
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http_errors import MalformedRequest
from router.schema import ChatRequest, parse_chat_request

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
FLAGS = """logprobs stream use_beam_search include_stop_str_in_output ignore_eos
skip_special_tokens spaces_between_special_tokens echo add_generation_prompt
continue_final_message add_special_tokens include_reasoning parallel_tool_calls
return_token_ids return_tokens_as_token_ids"""
INTEGERS = """top_logprobs max_tokens max_completion_tokens n seed top_k min_tokens
truncate_prompt_tokens prompt_logprobs priority"""
REALS = """frequency_penalty presence_penalty temperature top_p min_p repetition_penalty
length_penalty"""
TEXTS = "model user request_id chat_template cache_salt reasoning_effort"
OBJECTS = """logit_bias stream_options response_format structured_outputs chat_template_kwargs
mm_processor_kwargs kv_transfer_params vllm_xargs"""
LISTS = "messages tools stop_token_ids allowed_token_ids bad_words documents logits_processors"
MESSAGES = [{"role": "user", "content": "hi"}]
FUNCTION = {"name": "f"}


def parse(**fields: Any) -> ChatRequest:
    return parse_chat_request({"messages": MESSAGES, **fields})


def test_every_field_of_the_api_document_is_known() -> None:
    assert set(ChatRequest.model_fields) == set(DOCUMENTED.split())


def test_null_is_absent_for_every_field() -> None:
    nulls = dict.fromkeys(DOCUMENTED.split(), None)
    assert parse_chat_request({**nulls, "messages": MESSAGES}) == parse()


def test_messages_are_required() -> None:
    with pytest.raises(MalformedRequest, match=r"body\.messages"):
        parse_chat_request({})


# Types


def each(names: str, *values: object) -> list[tuple[str, object]]:
    return [(name, value) for name in names.split() for value in values]


WRONG: list[tuple[str, object]] = [
    *each(FLAGS, "true", 1, 0, [], {}),
    *each(INTEGERS, True, 1.5, "x", [], {}, "1.5", math.nan, math.inf),
    *each(INTEGERS, 2**63, -(2**63) - 1, 1e300),
    *each(REALS, False, "x", [], {}, "", 10**400),
    *each(TEXTS, 3, True, [], {}),
    *each(OBJECTS, 3, True, [], "x", [{}]),
    *each(LISTS, 3, True, {}, "x"),
    ("messages", ["hi"]),
    ("stop", 3),
    ("stop", {}),
    ("stop", ["a", 3]),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", [True]),
    ("allowed_token_ids", ["x"]),
    ("allowed_token_ids", [None]),
    ("bad_words", [3]),
    ("request_id", "x" * 2000),
    ("reasoning_effort", "huge"),
    ("stream_options", {"include_usage": "yes"}),
    ("stream_options", {"continuous_usage_stats": 1}),
    ("logit_bias", {"1": True}),
    ("logit_bias", {"1": "x"}),
    ("logit_bias", {"1": None}),
    ("logit_bias", {"1": []}),
    ("logit_bias", {"1": 10**400}),
    ("documents", ["x"]),
    ("documents", [{"text": 3}]),
    ("tools", ["f"]),
    ("tools", [{}]),
    ("tools", [{"type": "function"}]),
    ("tools", [{"type": "function", "function": {}}]),
    ("tools", [{"type": "function", "function": {"name": ""}}]),
    ("tools", [{"type": "function", "function": {"name": 3}}]),
    ("tools", [{"type": "web_search", "function": FUNCTION}]),
    ("tools", [{"type": "function", "function": {**FUNCTION, "parameters": []}}]),
    ("tools", [{"type": "function", "function": {**FUNCTION, "strict": "yes"}}]),
    ("tool_choice", 3),
    ("tool_choice", True),
    ("tool_choice", []),
    ("response_format", {}),
    ("response_format", {"type": 3}),
    ("response_format", {"type": "json_schema", "json_schema": "x"}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": "x"}}),
    ("response_format", {"type": "structural_tag", "structures": {}}),
    ("response_format", {"type": "structural_tag", "triggers": [3]}),
    ("structured_outputs", {"json": 3}),
    ("structured_outputs", {"json": [1]}),
    ("structured_outputs", {"regex": 3}),
    ("structured_outputs", {"choice": "x"}),
    ("structured_outputs", {"choice": [3]}),
    ("structured_outputs", {"grammar": {}}),
    ("structured_outputs", {"json_object": "true"}),
    ("structured_outputs", {"structural_tag": []}),
    ("structured_outputs", {"json": {}, "disable_fallback": 1}),
    ("structured_outputs", {"json": {}, "whitespace_pattern": 1}),
    ("logits_processors", [3]),
    ("logits_processors", [{}]),
    ("logits_processors", [{"qualname": 3}]),
    ("logits_processors", [{"qualname": "a.b", "args": {}}]),
    ("logits_processors", [{"qualname": "a.b", "kwargs": []}]),
    ("vllm_xargs", {"a": {}}),
    ("vllm_xargs", {"a": None}),
    ("vllm_xargs", {"a": True}),
    ("vllm_xargs", {"a": [[1]]}),
    ("vllm_xargs", {"a": 2**63}),
    ("vllm_xargs", {"a": [math.inf]}),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=str)
def test_wrong_types_name_the_field(field: str, value: object) -> None:
    with pytest.raises(MalformedRequest) as caught:
        parse_chat_request({"messages": MESSAGES, field: value})
    assert caught.value.param is not None
    assert caught.value.param.split(".")[:2] == ["body", field]
    assert len(str(caught.value)) < 500


RIGHT: list[tuple[str, object, object]] = [
    *((name, value, value) for name in FLAGS.split() for value in (True, False)),
    *((name, value, 5) for name in INTEGERS.split() for value in (5, 5.0, "5")),
    *((name, value, 0.5) for name in REALS.split() for value in (0.5, "0.5")),
    *((name, 1, 1.0) for name in REALS.split()),
    *((name, "high", "high") for name in TEXTS.split()),
    ("seed", 2**63 - 1, 2**63 - 1),
    ("seed", -(2**63), -(2**63)),
    ("priority", -(2**63), -(2**63)),
    ("stop", "a", ["a"]),
    ("stop", [], []),
    ("stop", ["a", "b"], ["a", "b"]),
    ("stop_token_ids", [1, 2.0, "3"], [1, 2, 3]),
    ("allowed_token_ids", [1], [1]),
    ("bad_words", ["a"], ["a"]),
    ("logit_bias", {"5": 1, "6": "-2.5"}, {"5": 1.0, "6": -2.5}),
    ("documents", [{"title": "a", "text": "b"}], [{"title": "a", "text": "b"}]),
    ("chat_template_kwargs", {"a": [1]}, {"a": [1]}),
    ("kv_transfer_params", {"do_remote_decode": True}, {"do_remote_decode": True}),
    ("vllm_xargs", {"a": "x", "b": 1, "c": [0.5, "y"]}, {"a": "x", "b": 1, "c": [0.5, "y"]}),
    ("tool_choice", "auto", "auto"),
    ("tool_choice", {"function": FUNCTION}, {"function": FUNCTION}),
]


@pytest.mark.parametrize(("field", "value", "read"), RIGHT, ids=str)
def test_right_types(field: str, value: object, read: object) -> None:
    got = getattr(parse(**{field: value}), field)
    assert got == read
    assert type(got) is type(read)


def test_numbers_that_are_not_finite_are_left_to_the_ranges() -> None:
    assert math.isnan(parse(temperature=math.nan).temperature or 0.0)


def test_unknown_fields_are_ignored_at_every_level() -> None:
    request = parse(
        foo={"bar": [math.nan]},
        stream=True,
        stream_options={"include_usage": True, "other": 1},
        structured_outputs={"regex": "a", "_backend": 3, "_backend_was_auto": "x"},
        response_format={"type": "text", "more": {}},
        logits_processors=[{"qualname": "a.b", "more": 1}],
    )
    assert request.stream_options is not None
    assert request.stream_options.include_usage
    assert request.structured_outputs is not None
    assert request.structured_outputs.regex == "a"


def test_tools_reach_the_template_as_they_were_sent() -> None:
    whole = {"function": {"parameters": {}, "x": 1, "name": "f"}, "y": 2, "type": "function"}
    short = {"function": {"name": "g"}, "type": None}
    tools = parse(tools=[whole, short]).tools or []
    assert list(tools[0].for_template.items()) == list(whole.items())
    assert list(tools[0].for_template["function"]) == ["parameters", "x", "name"]
    assert tools[1].for_template == {"type": "function", "function": {"name": "g"}}


def test_processors_in_both_forms() -> None:
    plain, made, full = (
        parse(
            logits_processors=[
                "a.b",
                {"qualname": "a.c", "args": None},
                {"qualname": "a.d", "args": [1], "kwargs": {"x": 2}},
            ]
        ).logits_processors
        or []
    )
    assert (plain.qualname, plain.args, plain.kwargs) == ("a.b", None, None)
    assert (made.qualname, made.args, made.kwargs) == ("a.c", [], {})
    assert (full.qualname, full.args, full.kwargs) == ("a.d", [1], {"x": 2})


def test_old_constraint_fields_are_ignored_with_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.schema._warned", set())
    with caplog.at_level(logging.WARNING, logger="router.schema"):
        for _ in range(3):
            assert parse(guided_json={"type": "object"}) == parse()
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "a request holds guided_json"
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_token_ids", ["x"] * 200_000),
        ("allowed_token_ids", [None] * 200_000),
        ("tools", [3] * 200_000),
        ("messages", [3] * 200_000),
        ("logit_bias", {str(i): [] for i in range(200_000)}),
        ("vllm_xargs", {str(i): {} for i in range(200_000)}),
        ("documents", [{str(i): 3 for i in range(200_000)}]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_many_wrong_items_cost_one_message(field: str, value: object) -> None:
    with pytest.raises(MalformedRequest) as caught:
        parse_chat_request({"messages": MESSAGES, field: value})
    assert len(str(caught.value)) < 300


def test_long_keys_are_not_repeated() -> None:
    with pytest.raises(MalformedRequest) as caught:
        parse(documents=[{"x" * 10_000: 3}])
    assert len(str(caught.value)) < 500


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**63, -(2**64), 10**400, 1e300, math.nan, "5", "1e999", "x" * 3000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(field=st.sampled_from(DOCUMENTED.split()), value=JSON)
def test_any_value_is_read_or_refused(field: str, value: object) -> None:
    refused: MalformedRequest | None = None
    try:
        parse_chat_request({"messages": MESSAGES, field: value})
    except MalformedRequest as error:
        refused = error
    assert refused is None or (refused.param or "").startswith(f"body.{field}")
