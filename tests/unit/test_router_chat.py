"""From a JSON object to what the workers get and how the answer is read."""

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.demo_model import ensure_demo_model
from cluster.demo_template import CHAT_TEMPLATE
from contracts.errors import ConfigurationError, InvalidRequest, NotFound, ServingError
from contracts.sampling import GrammarKind
from router.chat import ChatCall, ChatService
from router.config import RouterConfig
from router.deltas import Content, Reasoning, ToolCallStart
from router.metrics import RouterMetrics
from router.prompt import ChatPrompts
from router.schema import ChatRequest
from router.two_step import Step, Transfer
from router.workers import WorkerPool
from tests.support.fake_worker import FakeCluster, write_model_folder

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "clock", "description": "tells the time"}}
STRICT = {"type": "function", "function": {"name": "clock", "strict": True}}
JSON_OBJECT = {"response_format": {"type": "json_object"}}
NO_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}
MakeService = Callable[..., ChatService]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeService]:
    folder = write_model_folder(tmp_path_factory.mktemp("model"), template=CHAT_TEMPLATE)
    loaded: dict[str, ChatPrompts] = {}

    def make_service(**chosen: Any) -> ChatService:
        config = RouterConfig(
            **{
                "model_path": str(folder),
                "served_model_name": "m",
                "cluster_key": "k",
                "max_model_len": 400,
                **chosen,
            }
        )
        cluster = FakeCluster()
        pool = WorkerPool(cluster, cluster.open_session, router_id="r", cluster_key="k")
        if config.model_path not in loaded:
            loaded[config.model_path] = ChatPrompts.load(config.model_path)
        return ChatService(config, loaded[config.model_path], pool, RouterMetrics("m"))

    yield make_service
    for prompts in loaded.values():
        prompts.close()


@pytest.fixture(scope="module")
def service(make: MakeService) -> ChatService:
    return make()


async def check(service: ChatService, **fields: Any) -> ChatCall:
    return await service.check({"messages": MESSAGES, **fields}, None)


def prompt_of(service: ChatService, call: ChatCall) -> str:
    return service.prompts.decode(call.job.prompt_ids)


# The plain case and the fields that pass through


async def test_a_plain_request(service: ChatService) -> None:
    call = await check(service)
    assert prompt_of(service, call) == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert call.head.prompt_ids == call.job.prompt_ids
    assert (call.head.role, call.head.echo, call.head.model) == ("assistant", "", "m")
    assert (call.job.cache_salt, call.job.priority) == ("", 0)
    assert not call.stream
    assert call.job.transfer is None
    rules = call.job.rules
    assert (rules.stop, rules.include_stop, rules.tokens_as_ids) == ((), False, False)
    assert (rules.skip_special_tokens, rules.spaces_between_special_tokens) == (True, True)
    assert rules.primary_eos == service.prompts.primary_eos
    eos = (service.prompts.primary_eos, *service.prompts.secondary_eos)
    assert call.job.params.eos_token_ids == eos


async def test_fields_reach_their_places(service: ChatService) -> None:
    call = await check(
        service,
        cache_salt="salt",
        priority=-3,
        user="u",
        request_id="mine",
        stop="x",
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        return_tokens_as_token_ids=True,
        return_token_ids=True,
        logprobs=True,
        prompt_logprobs=1,
        model="m",
    )
    assert (call.job.cache_salt, call.job.priority) == ("salt", -3)
    assert call.head.response_id == "chatcmpl-mine"
    head = call.head
    assert (head.want_token_ids, head.want_logprobs, head.want_prompt_logprobs) == (True,) * 3
    rules = call.job.rules
    assert (rules.stop, rules.include_stop, rules.tokens_as_ids) == (("x",), True, True)
    assert (rules.skip_special_tokens, rules.spaces_between_special_tokens) == (False, False)


async def test_stream_options(service: ChatService) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    call = await check(service, stream=True, stream_options=options)
    assert (call.stream, call.include_usage, call.continuous_usage) == (True, True, True)


async def test_the_header_names_the_answer(service: ChatService) -> None:
    call = await service.check({"messages": MESSAGES, "request_id": "body"}, "header")
    assert call.head.response_id == "chatcmpl-header"


async def test_unknown_models_are_not_found(service: ChatService) -> None:
    with pytest.raises(NotFound) as caught:
        await check(service, model="other")
    assert caught.value.param == "model"


async def test_transfer_params_need_the_operators_leave(make: MakeService) -> None:
    given_params = {"do_remote_decode": True, "remote_host": "x"}
    assert (await check(make(), kv_transfer_params=given_params)).job.transfer is None
    allowed = make(allow_kv_transfer_params=True)
    call = await check(allowed, kv_transfer_params=given_params, n=2, max_tokens=9, temperature=1)
    assert call.job.transfer == Transfer(Step.EXPORT)
    assert (call.job.params.n, call.job.params.max_tokens) == (1, 1)
    assert (await check(allowed, kv_transfer_params={})).job.transfer is None


@pytest.mark.parametrize(
    "given_params",
    [
        {"do_remote_decode": True, "do_remote_prefill": True},
        {"do_remote_prefill": True},
        {"do_remote_decode": "yes"},
    ],
)
async def test_transfer_params_that_are_no_step(
    make: MakeService, given_params: dict[str, object]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await check(make(allow_kv_transfer_params=True), kv_transfer_params=given_params)
    assert caught.value.param == "kv_transfer_params"


async def test_the_operators_template_variables(make: MakeService) -> None:
    service = make(default_chat_template_kwargs={"enable_thinking": False})
    closed = "<think>\n\n</think>"
    assert closed in prompt_of(service, await check(service))
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    assert closed not in prompt_of(service, await check(service, **thinks))
    # What the parser and the grammar are told of the prompt includes them.
    assert await starting(service, **JSON_OBJECT) == ((), None)


async def test_the_operators_defaults(make: MakeService) -> None:
    changed = make(
        override_generation_config={"temperature": 0.5, "eos_token_id": 7},
        return_tokens_as_token_ids=True,
    )
    call = await check(changed)
    assert call.job.params.temperature == 0.5
    assert 7 in call.job.params.eos_token_ids
    assert call.job.rules.tokens_as_ids
    assert not (await check(changed, return_tokens_as_token_ids=False)).job.rules.tokens_as_ids


# The prompt


async def test_the_last_message_can_be_continued(service: ChatService) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "I am"}]
    call = await check(
        service,
        messages=messages,
        continue_final_message=True,
        add_generation_prompt=False,
        echo=True,
    )
    assert prompt_of(service, call).endswith("assistant\nI am")
    assert (call.head.role, call.head.echo) == ("assistant", "I am")
    assert call.job.params.prompt_logprobs == 0
    assert call.head.want_prompt_logprobs


async def test_template_variables(service: ChatService) -> None:
    call = await check(service, documents=[{"title": "t", "text": "the text"}])
    assert "the text" in prompt_of(service, call)
    call = await check(service, reasoning_effort="low")
    assert "Reasoning effort: low" in prompt_of(service, call)
    closed = "<think>\n\n</think>\n\n"
    assert prompt_of(service, await check(service, reasoning_effort="none")).endswith(closed)
    assert prompt_of(service, await check(service, **NO_THOUGHTS)).endswith(closed)
    call = await check(
        service, reasoning_effort="none", chat_template_kwargs={"enable_thinking": True}
    )
    assert not prompt_of(service, call).endswith(closed)


async def test_the_prompt_is_cut_from_the_left(service: ChatService) -> None:
    whole = (await check(service)).job.prompt_ids
    assert (await check(service, truncate_prompt_tokens=5)).job.prompt_ids == whole[-5:]
    assert (await check(service, truncate_prompt_tokens=-1)).job.prompt_ids == whole


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"),
    ({"continue_final_message": True}, None),
    ({"continue_final_message": True, "add_generation_prompt": True}, None),
    ({"chat_template": "x"}, None),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
    ({"mm_processor_kwargs": {"size": 1}}, "mm_processor_kwargs"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 401}, "truncate_prompt_tokens"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "input_tokens"),
    ({"max_tokens": 401}, "max_tokens"),
    ({"tools": [TOOL], "tool_choice": "required", **JSON_OBJECT}, None),
    ({"tools": [TOOL], "tool_choice": "required", "use_beam_search": True}, "tool_choice"),
    ({"tools": [STRICT], "use_beam_search": True}, "tools"),
    ({"use_beam_search": True, **JSON_OBJECT}, "response_format"),
    ({"logits_processors": ["os.system"]}, "logits_processors"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:60])
async def test_refused(service: ChatService, fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await check(service, **fields)
    assert caught.value.param == param


async def test_neutral_values_are_taken(service: ChatService) -> None:
    await check(
        service,
        mm_processor_kwargs={},
        chat_template_kwargs={},
        documents=[],
        kv_transfer_params={},
        tool_choice="none",
        add_generation_prompt=True,
        continue_final_message=False,
    )


# Tools, thoughts, constraints


async def test_parsers_are_found_by_the_template(make: MakeService) -> None:
    found = make()
    assert (found.tool_call_parser, found.reasoning_parser) == ("hermes", "qwen3")
    off = make(tool_call_parser="none", reasoning_parser="none")
    assert (off.tool_call_parser, off.reasoning_parser) == (None, None)
    assert (await check(off)).job.rules.make_parser is None
    with pytest.raises(ConfigurationError, match="tool_call_parser 'x' is unknown"):
        make(tool_call_parser="x")


async def test_calls_and_thoughts_are_read(service: ChatService) -> None:
    call = await check(service, tools=[TOOL])
    assert "tells the time" in prompt_of(service, call)
    assert call.job.params.grammar is None
    rules = call.job.rules
    assert not rules.skip_special_tokens  # the markers might be special tokens
    assert rules.make_parser is not None
    parser = rules.make_parser()
    text = '<think>a</think>b<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    deltas = [*parser.push(text), *parser.finish()]
    assert deltas[:2] == [Reasoning("a"), Content("b")]
    assert [delta.name for delta in deltas if isinstance(delta, ToolCallStart)] == ["clock"]
    assert rules.make_parser() is not parser


async def test_a_grammar_ends_with_the_models_tokens(service: ChatService) -> None:
    call = await check(service, ignore_eos=True, **JSON_OBJECT)
    grammar = call.job.params.grammar
    assert grammar is not None
    assert call.job.params.eos_token_ids == ()
    assert grammar.end_token_ids == service.model.eos_ids


async def starting(service: ChatService, **fields: Any) -> tuple[tuple[int, ...], int | None]:
    grammar = (await check(service, **fields)).job.params.grammar
    assert grammar is not None
    return grammar.start_after, grammar.opened_by


async def test_a_grammar_starts_behind_open_thoughts(make: MakeService) -> None:
    service = make(reasoning_parser="deepseek_r1")  # its thoughts are always open
    behind = (service.prompts.token_ids("</think>"), None)
    assert await starting(service, **JSON_OBJECT) == behind
    assert await starting(service, tools=[TOOL], tool_choice="required") == behind
    for fields in (NO_THOUGHTS, {"include_reasoning": False}, {"reasoning_effort": "none"}):
        assert await starting(service, **JSON_OBJECT, **fields) == ((), None), fields


async def test_a_grammar_leaves_the_model_to_think_or_not(
    make: MakeService, tmp_path: Path
) -> None:
    service = make(model_path=str(ensure_demo_model(tmp_path / "demo")))
    (start,) = service.prompts.token_ids("<think>")
    behind = (service.prompts.token_ids("</think>"), start)
    assert await starting(service, **JSON_OBJECT) == behind
    assert await starting(service, tools=[TOOL], tool_choice="required") == behind
    assert await starting(service, **JSON_OBJECT, **NO_THOUGHTS) == ((), None)
    # Where thoughts are opened by several tokens, no first token tells: it binds at once.
    assert await starting(make(), **JSON_OBJECT) == ((), None)


async def test_without_thoughts_to_show_a_bound_answer_is_content(service: ChatService) -> None:
    rules = (await check(service, include_reasoning=False, **JSON_OBJECT)).job.rules
    assert rules.make_parser is None
    assert not rules.include_reasoning
    rules = (await check(service, include_reasoning=False)).job.rules
    assert rules.make_parser is not None


async def test_forced_calls(service: ChatService) -> None:
    call = await check(service, tools=[TOOL], tool_choice="required", **NO_THOUGHTS)
    rules, grammar = call.job.rules, call.job.params.grammar
    assert grammar is not None
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    assert (rules.skip_special_tokens, rules.calls_finish) == (True, "tool_calls")
    choice = {"type": "function", "function": {"name": "clock"}}
    assert (await check(service, tools=[TOOL], tool_choice=choice)).job.rules.calls_finish == "stop"


async def test_a_constraint_goes_before_strict_tools(service: ChatService) -> None:
    call = await check(service, tools=[STRICT], **JSON_OBJECT)
    assert call.job.params.grammar is not None
    assert call.job.params.grammar.kind is GrammarKind.JSON_OBJECT
    call = await check(service, tools=[STRICT])
    assert call.job.params.grammar is not None
    assert call.job.params.grammar.kind is GrammarKind.STRUCTURAL_TAG


# Anything at all

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**63, 10**400, math.nan, "5", "1e999", "\ud800", "auto", "required"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=4)
            | st.sampled_from(["type", "function", "name", "json", "regex", "role", "content"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(fields=st.dictionaries(st.sampled_from(sorted(ChatRequest.model_fields)), JSON, max_size=4))
def test_any_value_in_any_field_is_served_or_refused(
    service: ChatService, fields: dict[str, Any]
) -> None:
    try:
        call = asyncio.run(check(service, **fields))
    except ServingError as error:
        assert not isinstance(error, ConfigurationError)  # noqa: PT017
        return
    assert call.job.prompt_ids
