"""Every violation gets its status and an OpenAI error body, streamed or not, before any compute."""

from typing import Any

import httpx
import pytest

from tests.support.conformance import Api

field = pytest.mark.field
VALUE, SHAPE = "BadRequestError", "Bad Request"
TOOL = {"type": "function", "function": {"name": "f"}}
ANY = object()
BIG = 10**30


def row(param: object, kind: Any = VALUE, **fields: Any) -> Any:
    """One request and the `param` its error names."""
    name = "-".join(f"{key}={value!r}" for key, value in fields.items())[:60]
    return pytest.param(fields, kind, param, id=name or "none")


VIOLATIONS = [
    # Types
    row("body.temperature", SHAPE, temperature="hot"),
    row("body.temperature", SHAPE, temperature=True),
    row("body.n", SHAPE, n=1.5),
    row("body.n", SHAPE, n="many"),
    row("body.max_tokens", SHAPE, max_tokens=[1]),
    row("body.stream", SHAPE, stream="maybe"),
    row("body.ignore_eos", SHAPE, ignore_eos="perhaps"),
    row("body.user", SHAPE, user=5),
    row("body.stop", SHAPE, stop=[1]),
    row(ANY, SHAPE, stop_token_ids=["x"]),
    row(ANY, SHAPE, allowed_token_ids=[1.5]),
    row("body.logit_bias", SHAPE, logit_bias=[1]),
    row(ANY, SHAPE, bad_words=[1]),
    row(ANY, SHAPE, documents=["text"]),
    row(ANY, SHAPE, documents=[{"text": 5}]),
    row("body.chat_template_kwargs", SHAPE, chat_template_kwargs=[1]),
    row("body.kv_transfer_params", SHAPE, kv_transfer_params="x"),
    row("body.cache_salt", SHAPE, cache_salt=5),
    row("body.priority", SHAPE, priority="high"),
    row("body.request_id", SHAPE, request_id=5),
    row("body.reasoning_effort", SHAPE, reasoning_effort="huge"),
    row(ANY, SHAPE, vllm_xargs={"a": {"b": 1}}),
    row("body.length_penalty", SHAPE, length_penalty="long"),
    row("body.seed", SHAPE, seed=2**63),
    row("body.seed", SHAPE, seed=-(2**63) - 1),
    row("body.seed", SHAPE, seed="x"),
    row("body.messages", SHAPE, messages="hi"),
    # Ranges
    row("temperature", temperature=-0.1),
    row("temperature", temperature=2.1),
    row("top_p", top_p=0),
    row("top_p", top_p=1.1),
    row("top_k", top_k=-2),
    row("min_p", min_p=-0.1),
    row("min_p", min_p=1.1),
    row("frequency_penalty", frequency_penalty=2.1),
    row("presence_penalty", presence_penalty=-2.1),
    row("repetition_penalty", repetition_penalty=0),
    row("n", n=0),
    row("n", n=100000, temperature=1),
    row("n", n=2),  # greedy
    row("max_tokens", max_tokens=0),
    row("max_tokens", max_tokens=4097),
    row("max_tokens", max_tokens=-5),
    row("max_completion_tokens", max_completion_tokens=0),
    row("max_completion_tokens", max_completion_tokens=4097),
    row("min_tokens", min_tokens=-1),
    row("min_tokens", min_tokens=9),
    row("stop", stop=""),
    row("stop", stop=["a", ""]),
    row("stop", stop=["a", "b", "c", "d", "e"]),
    row("stop_token_ids", stop_token_ids=[2048]),
    row("stop_token_ids", stop_token_ids=[-1]),
    row("allowed_token_ids", allowed_token_ids=[]),
    row("allowed_token_ids", allowed_token_ids=[2048]),
    row("logit_bias", logit_bias={"2048": 1}),
    row("logit_bias", logit_bias={"-1": 1}),
    row("logit_bias", logit_bias={"x": 1}),
    row("bad_words", bad_words=[""]),
    row("top_logprobs", top_logprobs=1),
    row("top_logprobs", logprobs=True, top_logprobs=-2),
    row("prompt_logprobs", prompt_logprobs=-2),
    row("stream_options", stream_options={"include_usage": True}),
    row(ANY, truncate_prompt_tokens=0),
    row(ANY, SHAPE, truncate_prompt_tokens=-2),
    row("truncate_prompt_tokens", truncate_prompt_tokens=4097),
    row("cache_salt", cache_salt=""),
    row("cache_salt", cache_salt="a/b"),
    row("cache_salt", cache_salt="x" * 129),
    # Beams
    row(ANY, use_beam_search=True, n=2, frequency_penalty=1),
    row(ANY, use_beam_search=True, n=2, logit_bias={"5": 1}),
    row(ANY, use_beam_search=True, n=2, stop="x"),
    row(ANY, use_beam_search=True, n=2, min_tokens=2),
    row(ANY, use_beam_search=True, n=2, structured_outputs={"choice": ["a"]}),
    row(ANY, use_beam_search=True, n=2, bad_words=["x"]),
    # Messages and prompt
    row("messages", messages=[]),
    row(ANY, ANY, messages=[{"content": "no role"}]),
    row(ANY, ANY, messages=["text"]),
    row(ANY, ANY, messages=[{"role": "user", "content": [{"type": "what", "what": 1}]}]),
    row(
        ANY,
        ANY,
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}],
            }
        ],
    ),
    row(None, add_generation_prompt=True, continue_final_message=True),
    row(None, continue_final_message=True),
    row(ANY, chat_template="{% for %}"),
    row(ANY, chat_template="{{ raise_exception('not today') }}"),
    row(ANY, chat_template="{{ messages.__class__.__mro__ }}"),
    row(ANY, chat_template_kwargs={"chat_template": "x"}),
    row(ANY, chat_template_kwargs={"tokenize": True}),
    row("input_tokens", messages=[{"role": "user", "content": "sea " * 5000}]),
    row(ANY, messages=[{"role": "user", "content": "x" * 10_000_000}]),
    # Tools
    row("tools", tools=[]),
    row(ANY, SHAPE, tools=[{"type": "function", "function": {}}]),
    row("tool_choice", tool_choice="auto"),
    row("tool_choice", tool_choice="required"),
    row(ANY, tool_choice="maybe", tools=[TOOL]),
    row(ANY, tool_choice={"type": "function", "function": {"name": "g"}}, tools=[TOOL]),
    row(ANY, tool_choice={"type": "function"}, tools=[TOOL]),
    row(
        ANY,
        tool_choice={"type": "function", "function": {"name": "f"}},
        tools=[TOOL],
        structured_outputs={"regex": "a"},
    ),
    # Constraints
    row(None, structured_outputs={}),
    row(None, structured_outputs={"regex": "a", "choice": ["b"]}),
    row(None, structured_outputs={"regex": "a"}, response_format={"type": "json_object"}),
    row(ANY, structured_outputs={"regex": "(a"}),
    row(ANY, structured_outputs={"choice": []}),
    row(ANY, structured_outputs={"grammar": "root ::= missing"}),
    row(ANY, structured_outputs={"grammar": "this is no grammar"}),
    row(ANY, structured_outputs={"json": {"type": "nonsense"}}),
    row(ANY, structured_outputs={"json": "{"}),
    row(ANY, structured_outputs={"json_object": False}),
    row(ANY, structured_outputs={"structural_tag": "{}"}),
    row("response_format", response_format={"type": "json_schema"}),
    row("response_format", response_format={"type": "xml"}),
    row(
        ANY,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"$ref": "#/no"}},
        },
    ),
    # Numbers
    row(ANY, ANY, seed=BIG),
    row(ANY, ANY, max_tokens=BIG),
    row(ANY, ANY, top_k=BIG),
    row(ANY, ANY, priority=BIG),
    row("model", "NotFoundError", model="no-such-model"),
]


@pytest.mark.parametrize(("fields", "kind", "param"), VIOLATIONS)
def test_a_violation_is_refused(api: Api, fields: dict[str, Any], kind: Any, param: object) -> None:
    refusal = api.refused(**fields)
    assert refusal.status == (404 if "model" in fields else 400)
    error = refusal.error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == refusal.status
    assert error["message"]
    assert len(error["message"]) <= 500
    assert "Traceback" not in error["message"]
    assert kind is ANY or error["type"] in (kind, SHAPE if kind == VALUE else VALUE)
    if param is not ANY:
        assert error["param"] in (param, f"body.{param}", str(param).removeprefix("body."))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "name",
    [
        *("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty"),
        *("repetition_penalty", "length_penalty", "max_tokens", "n", "seed"),
    ],
)
def test_numbers_that_are_none(api: Api, name: str, value: str) -> None:
    body = '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "%s": %s}'
    answer = raw(api, (body % (name, value)).encode())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("body", name, f"body.{name}")


def raw(api: Api, content: bytes, media_type: str = "application/json") -> httpx.Response:
    headers = {"Content-Type": media_type}
    return httpx.post(
        f"{api.url}/v1/chat/completions", content=content, headers=headers, timeout=60
    )


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"text"', id="text"),
        pytest.param(b"\xff\xfe{}", id="not-utf-8"),
        pytest.param(b"[" * 100_000, id="deep-list"),
        pytest.param(b'{"a":' * 100_000, id="deep-object"),
        pytest.param(b'{"messages": [{"role": "user", "content": "\\ud800"}]}', id="surrogate"),
        pytest.param(b'{"messages": [{"role": "\\udfff", "content": "a"}]}', id="surrogate-role"),
        pytest.param(b'{"messages": 1' + b"0" * 5000 + b"}", id="huge-number"),
    ],
)
def test_a_body_that_is_no_request(api: Api, content: bytes) -> None:
    answer = raw(api, content)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == 400
    assert error["type"] in (SHAPE, VALUE)


def test_another_media_type(api: Api) -> None:
    answer = raw(api, b'{"messages": [{"role": "user", "content": "hi"}]}', "text/plain")
    assert answer.status_code in (400, 415)
    assert answer.json()["error"]["message"]


def test_a_stream_that_cannot_start_is_an_http_error(api: Api) -> None:
    for fields in ({"temperature": 9}, {"structured_outputs": {"regex": "(a"}}):
        body = api.body(stream=True, **fields)
        answer = httpx.post(f"{api.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/no-such-thing", 404), ("GET", "/v1/chat/completions", 405)],
)
def test_other_paths_and_methods(
    api: Api, only_baton: None, method: str, path: str, status: int
) -> None:
    answer = httpx.request(method, api.url + path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status


@field("prompt_logprobs")
def test_no_prompt_logprobs_in_a_stream(api: Api) -> None:
    body = api.body(stream=True, prompt_logprobs=1)
    answer = httpx.post(f"{api.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt_logprobs"


def test_null_is_the_same_as_absent(api: Api) -> None:
    nulls = dict.fromkeys(
        (
            *("logit_bias", "stop", "seed", "top_p", "top_k", "min_p", "tools", "tool_choice"),
            *("response_format", "structured_outputs", "documents", "bad_words", "stop_token_ids"),
            *("logprobs", "top_logprobs", "prompt_logprobs", "user", "cache_salt", "priority"),
            *("stream_options", "n", "echo", "include_reasoning", "parallel_tool_calls"),
            *("add_generation_prompt", "continue_final_message", "chat_template", "min_tokens"),
            *("logits_processors", "vllm_xargs", "kv_transfer_params", "request_id"),
        )
    )
    body = api.body()
    plain = api.post("/v1/chat/completions", body)
    nulled = api.post("/v1/chat/completions", {**body, **nulls})
    assert nulled["choices"] == plain["choices"]


def test_unknown_fields_are_ignored(api: Api) -> None:
    extra = {"no_such_field": 1, "guided_choice": ["a"], "best_of": 3, "store": True}
    plain = api.post("/v1/chat/completions", api.body())
    assert api.post("/v1/chat/completions", api.body(**extra))["choices"] == plain["choices"]
