"""litellm runs unmodified against Baton."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.live_server import LiveServer
from tests.support.sdk_server import MODEL, sdk_server

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its price list stays at home
litellm = pytest.importorskip("litellm")
litellm.telemetry = False
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, of pydantic

MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"where": {"enum": ["here", "there"]}},
            "required": ["where"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with sdk_server(tmp_path_factory.mktemp("sdk")) as running:
        yield running


def ask(server: LiveServer, **fields: Any) -> Any:
    """litellm knows us as a vLLM server."""
    return litellm.completion(
        model=f"hosted_vllm/{MODEL}",
        api_base=server.base_url,
        api_key="none",
        messages=MESSAGES,
        **{"temperature": 0, "max_tokens": 12, **fields},
    )


def test_chat_and_stream(server: LiveServer) -> None:
    answer = ask(server)
    text = answer.choices[0].message.content
    assert text
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    )


def test_tools(server: LiveServer) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
    answer = ask(server, parallel_tool_calls=False, **fields)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "look"
    assert json.loads(call.function.arguments)["where"] in ("here", "there")
    assert answer.choices[0].finish_reason == "tool_calls"


def test_structured_output(server: LiveServer) -> None:
    chosen = {"type": "json_schema", "json_schema": {"name": "paint", "schema": SCHEMA}}
    answer = ask(server, response_format=chosen, max_tokens=100)
    assert json.loads(answer.choices[0].message.content)["colour"] in ("red", "blue")


def test_an_error_is_the_libraries_own(server: LiveServer) -> None:
    with pytest.raises(litellm.BadRequestError, match="top_k"):
        ask(server, top_k=-7)


async def test_asynchronous(server: LiveServer) -> None:
    answer = await litellm.acompletion(
        model=f"hosted_vllm/{MODEL}",
        api_base=server.base_url,
        api_key="none",
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
    )
    await litellm.close_litellm_async_clients()
    assert answer.choices[0].message.content == ask(server).choices[0].message.content
