"""POST /v1/responses over fake workers, through the official client."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall
from pydantic import BaseModel

from router.endpoints import answer_types
from tests.support.router_http import TEXTS, Served, serve

CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "the sky"}}\n</tool_call>'
WEATHER: Any = {
    "type": "function",
    "name": "look",
    "description": "Look at it",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    "strict": False,
}


@asynccontextmanager
async def client_of(
    tmp_path: Path, texts: Sequence[str] = TEXTS, **settings: Any
) -> AsyncIterator[tuple[Served, openai.AsyncOpenAI]]:
    settings = {"tool_call_parser": "hermes", "reasoning_parser": "deepseek_r1", **settings}
    async with serve(tmp_path, texts=texts, **settings) as served:
        yield served, served.official()


def shape(response: Response) -> Any:
    """A response without what differs from answer to answer."""
    body = response.model_dump(exclude={"id", "created_at", "completed_at"})
    for item in body["output"]:
        item.pop("id")
        if item["type"] == "function_call":
            item.pop("call_id")
    return body


async def test_a_text(tmp_path: Path) -> None:
    async with client_of(tmp_path, reasoning_parser="none") as (served, client):
        served.p.cached_tokens = 4
        answer = await client.responses.create(
            model="org/demo", input="hi", instructions="Be short.", metadata={"a": "b"}, top_p=0.5
        )
        (request, _) = served.p.submitted[0]
        prompt = served.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False)
    answer_types.Response.model_validate(answer.model_dump())
    assert answer.id.startswith("resp_")
    assert (answer.status, answer.output_text, answer.metadata) == (
        "completed",
        TEXTS[0],
        {"a": "b"},
    )
    assert answer.top_p == 0.5
    assert answer.model_dump()["store"] is False
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(request.prompt_ids)
    assert answer.usage.input_tokens_details.cached_tokens == 4
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert prompt.startswith(
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nhi<|im_end|>"
    )


async def test_what_is_cut_is_incomplete(tmp_path: Path) -> None:
    async with client_of(tmp_path, reasoning_parser="none") as (_, client):
        answer = await client.responses.create(model="demo", input="hi", max_output_tokens=2)
        async with client.responses.stream(model="demo", input="hi", max_output_tokens=2) as stream:
            kinds = [event.type async for event in stream]
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert kinds[-1] == "response.incomplete"


async def test_thoughts_text_and_calls_are_items_of_their_own(tmp_path: Path) -> None:
    text = f"<think>it is up</think>\n\nLooking. {CALL}\n{CALL}"
    async with client_of(tmp_path, [text]) as (_, client):
        answer = await client.responses.create(model="demo", input="hi", tools=[WEATHER])
    assert [item.type for item in answer.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    thoughts, message, call, _ = answer.output
    assert thoughts.type == "reasoning"
    assert thoughts.content is not None
    assert thoughts.content[0].text == "it is up"
    assert answer.output_text.strip() == "Looking."
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, json.loads(call.arguments)) == ("look", {"at": "the sky"})
    assert message.type == "message"
    assert answer.tools[0].model_dump(include=set(WEATHER)) == WEATHER


@pytest.mark.parametrize(
    "text",
    [TEXTS[0], f"<think>hm</think>{TEXTS[1]}", f"<think>a\nb</think>\n\nx{CALL}{CALL}", CALL, ""],
)
@pytest.mark.parametrize("frame", [1, 5])
async def test_a_stream_adds_up_to_the_full_response(tmp_path: Path, text: str, frame: int) -> None:
    fields: Any = {"model": "demo", "input": "hi", "tools": [WEATHER], "temperature": 0.5}
    async with client_of(tmp_path, [text]) as (served, client):
        for worker in served.workers:
            worker.tokens_per_frame = frame
        full = await client.responses.create(**fields)
        events = [e async for e in await client.responses.create(stream=True, **fields)]
        async with client.responses.stream(**fields) as stream:
            accumulated = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == "response.completed"
    assert shape(last.response) == shape(full)
    assert shape(accumulated)["status"] == "completed"
    for index, item in enumerate(full.output):
        of_item = [event for event in events if getattr(event, "output_index", None) == index]
        assert of_item[0].type == "response.output_item.added"
        assert of_item[-1].type == "response.output_item.done"
        deltas = "".join(event.delta for event in of_item if event.type.endswith(".delta"))
        if isinstance(item, ResponseFunctionToolCall):
            assert deltas == item.arguments
        else:
            assert deltas == item.content[0].text


async def test_a_conversation_goes_on_with_its_items(tmp_path: Path) -> None:
    text = f"<think>hm</think>one {CALL}"
    async with client_of(tmp_path, [text]) as (served, client):
        first = await client.responses.create(model="demo", input="hi", tools=[WEATHER])
        call = first.output[-1]
        assert isinstance(call, ResponseFunctionToolCall)
        items: Any = [
            {"role": "user", "content": "hi"},
            *(item.model_dump(exclude_none=True) for item in first.output),
            {"type": "function_call_output", "call_id": call.call_id, "output": "blue"},
            {"role": "user", "content": [{"type": "input_text", "text": "and now?"}]},
        ]
        served.p.submitted.clear()
        await client.responses.create(model="demo", input=items, tools=[WEATHER])
        (request, _) = served.p.submitted[0]
        prompt = served.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False)
    turns = prompt.split("<|im_start|>")
    assert [turn.partition("\n")[0] for turn in turns[1:]] == [
        "user",
        "assistant",
        "tool",
        "user",
        "assistant",
    ]


async def test_logprobs(tmp_path: Path) -> None:
    fields: Any = {"model": "demo", "input": "hi", "top_logprobs": 2}
    fields["include"] = ["message.output_text.logprobs"]
    async with client_of(tmp_path, reasoning_parser="none") as (_, client):
        full = await client.responses.create(**fields)
        events = [e async for e in await client.responses.create(stream=True, **fields)]
    entries = full.output[0].content[0].logprobs
    assert entries
    assert len(entries[0].top_logprobs) == 2
    assert events[-1].response.output[0].content[0].logprobs == entries


class Sky(BaseModel):
    color: str


async def test_structured_output(tmp_path: Path) -> None:
    text = '{"color": "blue"}'
    async with client_of(tmp_path, [text], reasoning_parser="none") as (served, client):
        answer = await client.responses.parse(model="demo", input="hi", text_format=Sky)
        grammar = served.p.submitted[0][0].params.grammar
    assert answer.output_parsed == Sky(color="blue")
    assert grammar is not None
    assert json.loads(grammar.text)["required"] == ["color"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "body.input"),
        ({"input": [1]}, "body.input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 1000}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 100}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "body.tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "body.tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "body.tool_choice.type"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": [WEATHER]}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "enormous"}}, "body.reasoning.effort"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_requests(
    tmp_path: Path, fields: dict[str, Any], param: str, stream: bool
) -> None:
    async with client_of(tmp_path) as (served, _):
        body = {"model": "demo", "input": "hi", "stream": stream, **fields}
        response = await served.client.post("/v1/responses", json=body)
        assert not served.p.submitted
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_nothing_is_stored(tmp_path: Path) -> None:
    async with client_of(tmp_path) as (served, client):
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_1")
        with pytest.raises(openai.NotFoundError):
            await client.responses.cancel("resp_1")
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="gpt", input="hi")
        response = await served.client.get("/v1/responses/resp_1")
    assert response.json()["error"]["type"] == "NotFoundError"


async def test_a_late_failure_is_an_event(tmp_path: Path) -> None:
    async with client_of(tmp_path, reasoning_parser="none") as (served, client):
        served.d.fail_kind_at = 3
        stream = await client.responses.create(model="demo", input="hi", stream=True)
        events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert events[-1].response.error.code == "server_error"
