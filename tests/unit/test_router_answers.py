"""Stream and full answer tell the same, however the tokens came."""

from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.events import FinishReason
from contracts.sampling import SamplingParams
from router.deltas import OutputParser
from router.parsers.registry import make_output_parser
from router.parsers.specs import ToolParsing, ToolSpec
from router.rules import OutputRules
from tests.support.chat_answer import EOS, OTHER_EOS, PROMPT, Chat, Told, frames, ids, joined
from tests.support.tiny_parser import TinyParser

SCRAPS = ["<t>", "</t>", "<c>", "f|", '{"a": 1}', "</c>", "cat ", "€", "🙂", "EN", "D", "<", "/t"]
TEXTS = st.lists(st.sampled_from(SCRAPS), max_size=12).map("".join)
PARSERS = st.sampled_from([None, TinyParser, partial(TinyParser, thinking=True)])

RULES = st.builds(
    OutputRules,
    stop=st.sampled_from([(), ("END",), ("</t", "D"), ("cat \u20ac", "cat")]),
    primary_eos=st.just(EOS),
    include_stop=st.booleans(),
    tokens_as_ids=st.booleans(),
    make_parser=PARSERS,
    include_reasoning=st.booleans(),
)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(500),
    eos_token_ids=st.just((EOS, OTHER_EOS)),
    logprobs=st.sampled_from([None, 0, 2]),
    min_tokens=st.sampled_from([0, 3]),
)
CHATS = st.builds(
    Chat,
    rules=RULES,
    params=PARAMS,
    echo=st.sampled_from(["", "so "]),
    want_token_ids=st.booleans(),
)
ENDS = st.sampled_from([(FinishReason.STOP, [EOS]), (FinishReason.STOP, [OTHER_EOS]), None])


@settings(max_examples=300, deadline=None)
@given(chat=CHATS, text=TEXTS, end=ENDS, cuts=st.lists(st.integers(1, 40), max_size=8))
def test_any_cut_into_frames_gives_one_answer(
    chat: Chat, text: str, end: tuple[FinishReason, list[int]] | None, cuts: list[int]
) -> None:
    reason, closing = end or (FinishReason.LENGTH, [])
    tokens = [*ids(text), *closing] or ids("x")
    num_top = chat.params.logprobs
    whole = chat.run(frames(tokens, reason, num_top=num_top))
    cut = chat.run(frames(tokens, reason, cuts, num_top))
    single = chat.run(frames(tokens, reason, range(len(tokens)), num_top))
    expected = chat.full(whole)
    assert chat.full(cut) == chat.full(single) == expected
    assert joined(chat.chunks(whole)) == expected
    assert joined(chat.chunks(cut)) == expected
    assert joined(chat.chunks(single)) == expected
    assert chat.usage(cut) == chat.usage(single) == chat.usage(whole)
    if chat.want_token_ids and num_top is not None:
        assert len(expected.logprobs) == len(expected.token_ids)


REAL = {
    "hermes": ["<tool_call>", '{"name": "f", "arguments": {"a"', ": 1}}", "</tool_call>", "\n"],
    "qwen3_coder": ["<tool_call><function=f>", "<parameter=a>", "1</parameter>", "</function>"],
    "mistral": ["[TOOL_CALLS]", '[{"name": "f", "arguments": {}}]', "f{", "}"],
    "pythonic": ["[f(", "a=1", ")", ", f()", "]"],
}
THOUGHTS = ["<think>", "</think>", "\n\n", "hm ", "so", "<", "€"]


@st.composite
def real_texts(draw: st.DrawFn) -> tuple[str, str]:
    name = draw(st.sampled_from(sorted(REAL)))
    scraps = st.lists(st.sampled_from([*THOUGHTS, *REAL[name]]), max_size=12)
    return name, draw(scraps.map("".join))


@settings(max_examples=200, deadline=None)
@given(
    named=real_texts(),
    reasoning=st.sampled_from([None, "qwen3", "deepseek_r1"]),
    include=st.booleans(),
    stop=st.sampled_from([(), ("m so",), ("</t",)]),
    cuts=st.lists(st.integers(1, 40), max_size=8),
)
def test_real_parsers_give_one_answer_too(
    named: tuple[str, str],
    reasoning: str | None,
    include: bool,
    stop: tuple[str, ...],
    cuts: list[int],
) -> None:
    name, text = named

    def parser() -> OutputParser:
        tools = ToolParsing("auto", name, (ToolSpec("f", {"properties": {"a": {}}}),))
        made = make_output_parser(
            reasoning=reasoning,
            tools=tools,
            tail="",
            template_kwargs={},
            new_id=lambda name, index: f"{name}-{index}",
        )
        assert made is not None
        return made

    rules = OutputRules(stop, EOS, make_parser=parser, include_reasoning=include)
    chat = Chat(rules, SamplingParams(max_tokens=500, eos_token_ids=(EOS,), logprobs=1))
    tokens = [*ids(text), EOS]
    whole = chat.run(frames(tokens, FinishReason.STOP, num_top=1))
    cut = chat.run(frames(tokens, FinishReason.STOP, cuts, 1))
    expected = chat.full(whole)
    assert chat.full(cut) == expected
    assert joined(chat.chunks(whole)) == joined(chat.chunks(cut)) == expected
    assert chat.usage(whole) == chat.usage(cut)


@given(text=TEXTS, parser=PARSERS)
def test_what_is_told_is_what_the_parser_makes_of_the_whole_text(text: str, parser: Any) -> None:
    if parser is None or not text:
        return
    one = parser()
    deltas = [*one.push(text), *one.finish()]
    chat = Chat(OutputRules(primary_eos=EOS, make_parser=parser))
    told = chat.full(chat.run(frames([*ids(text), EOS], FinishReason.STOP, range(50))))
    kinds = {"Content": "", "Reasoning": ""}
    for delta in deltas:
        if type(delta).__name__ in kinds:
            kinds[type(delta).__name__] += delta.text
    assert told.content == kinds["Content"]
    assert told.reasoning == kinds["Reasoning"]
    assert len(told.calls) == one.calls
    assert told.finish_reason == ("tool_calls" if one.calls else "stop")


# The full answer


def told(chat: Chat, text: str, finish: FinishReason = FinishReason.STOP) -> Told:
    closing = [EOS] if finish is FinishReason.STOP else []
    return chat.full(chat.run(frames([*ids(text), *closing], finish)))


def message(text: str, **settings: Any) -> dict[str, Any]:
    chat = Chat(OutputRules(primary_eos=EOS, make_parser=TinyParser), **settings)
    body = chat.body(chat.run(frames([*ids(text), EOS], FinishReason.STOP)))
    found: dict[str, Any] = body["choices"][0]["message"]
    return found


def test_a_plain_message() -> None:
    assert message("It is.") == {
        "role": "assistant",
        "content": "It is.",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
        "reasoning_content": None,
    }


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "num_calls"),
    [
        ("", "", None, 0),
        ("<t>hm</t>so", "so", "hm", 0),
        ("<t>hm", None, "hm", 0),
        ("<c>f|{}</c>", None, None, 1),
        ("ok<c>f|{}</c><c>g|1</c>", "ok", None, 2),
    ],
)
def test_content_is_null_beside_calls_or_thoughts_only(
    text: str, content: str | None, reasoning: str | None, num_calls: int
) -> None:
    found = message(text)
    assert found["content"] == content
    assert found["reasoning"] == found["reasoning_content"] == reasoning
    assert len(found.get("tool_calls", [])) == num_calls
    assert ("tool_calls" in found) == (num_calls > 0)


def test_a_call_in_full() -> None:
    assert message('<c>f|{"a": 1}</c>')["tool_calls"] == [
        {"id": "id0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    ]


def test_echo_is_in_front_of_the_content() -> None:
    assert message("ly true", echo="real")["content"] == "really true"
    assert message("<c>f|{}</c>", echo="real")["content"] == "real"


def test_reasoning_tokens_are_told_if_somebody_looks_for_them() -> None:
    thoughts = ids("hm")
    chat = Chat(OutputRules(primary_eos=EOS, make_parser=partial(TinyParser, thinking=True)))
    tokens = [*thoughts, *ids("</t>"), *ids("so"), EOS]
    pieces = chat.run(frames(tokens, FinishReason.STOP))
    usage = chat.body(pieces)["usage"]
    marker = len(ids("</t>"))
    assert usage["completion_tokens"] == len(tokens)
    counted = usage["completion_tokens_details"]["reasoning_tokens"]
    assert counted == len(thoughts) + marker - 1  # the marker's last token ends them
    plain = Chat()
    assert (
        "completion_tokens_details"
        not in plain.body(plain.run(frames(tokens, FinishReason.STOP)))["usage"]
    )


# The stream


def shapes(chat: Chat, text: str, cuts: Any = range(100), **options: bool) -> list[Any]:
    pieces = chat.run(frames([*ids(text), EOS], FinishReason.STOP, cuts))
    chunks = chat.chunks(pieces, **options)
    return [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks]


def test_calls_begin_with_id_and_name_and_go_on_with_arguments() -> None:
    chat = Chat(OutputRules(primary_eos=EOS, make_parser=TinyParser), want_token_ids=False)
    assert shapes(chat, "<c>f|{}</c>", ()) == [
        ({"role": "assistant", "content": ""}, None),
        (
            {
                "tool_calls": [
                    {
                        "index": 0,
                        "id": "id0",
                        "type": "function",
                        "function": {"name": "f", "arguments": ""},
                    }
                ]
            },
            None,
        ),
        ({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}, None),
        ({"content": ""}, "tool_calls"),
    ]


def test_thoughts_have_both_names_and_never_share_a_chunk_with_content() -> None:
    chat = Chat(OutputRules(primary_eos=EOS, make_parser=TinyParser))
    assert shapes(chat, "<t>hm</t>so", ()) == [
        ({"role": "assistant", "content": ""}, None),
        ({"reasoning": "hm", "reasoning_content": "hm"}, None),
        ({"content": "so"}, None),
        ({"content": ""}, "stop"),
    ]


def test_the_role_comes_with_the_first_token_and_the_echo_before_it() -> None:
    assert shapes(Chat(), "ab", [1])[0] == ({"role": "assistant", "content": "a"}, None)
    assert shapes(Chat(echo="so "), "ab", [1])[:2] == [
        ({"role": "assistant", "content": "so "}, None),
        ({"content": "a"}, None),
    ]


def test_a_token_that_shows_nothing_is_sent_only_if_its_id_is_wanted() -> None:
    euro = "a€"
    tokens = len(ids(euro))
    pieces = Chat().run(frames([*ids(euro), EOS], FinishReason.STOP, range(10)))
    wanted = Chat().chunks(pieces)
    assert [len(c["choices"][0]["token_ids"]) for c in wanted] == [1] * (tokens + 1)
    without = Chat(want_token_ids=False).chunks(pieces)
    assert [c["choices"][0]["delta"].get("content") for c in without] == ["a", "€", ""]


def test_hidden_thoughts_leave_nothing_but_their_count() -> None:
    params = SamplingParams(max_tokens=500, eos_token_ids=(EOS,), logprobs=1)
    rules = OutputRules(
        primary_eos=EOS,
        make_parser=partial(TinyParser, thinking=True),
        include_reasoning=False,
    )
    chat = Chat(rules, params)
    tokens = [*ids("hm"), *ids("</t>"), *ids("so"), EOS]
    pieces = chat.run(frames(tokens, FinishReason.STOP, range(50), 1))
    found = joined(chat.chunks(pieces))
    assert (found.content, found.reasoning) == ("so", "")
    assert found.token_ids == [*ids("so"), EOS]
    assert [entry["token"] for entry in found.logprobs] == [*map_tokens("so"), "<|im_end|>"]
    assert chat.usage(pieces).completion_tokens == len(tokens)
    chunks = chat.chunks(pieces)
    assert len(chunks) == 1 + len(ids("so")) + 1  # the role, what is shown, the end


def test_the_tokens_of_markers_are_hidden_with_the_thoughts() -> None:
    chat = Chat(OutputRules(primary_eos=EOS, make_parser=TinyParser, include_reasoning=False))
    opening, closing = ids("<t>"), ids("</t>")
    tokens = [*ids("a"), *opening, *ids("hm"), *closing, *ids("so"), EOS]
    found = joined(chat.chunks(chat.run(frames(tokens, FinishReason.STOP, range(50)))))
    # What a marker begins with is not known as one before it is complete.
    assert found.token_ids == [*ids("a"), *opening[:-1], *ids("so"), EOS]
    assert found.content == "aso"


def test_ids_are_in_the_first_chunk_that_shows_a_part() -> None:
    chat = Chat(OutputRules(primary_eos=EOS, make_parser=TinyParser), echo="so ")
    tokens = [*ids("a<t>hm</t>"), EOS]
    chunks = chat.chunks(chat.run(frames(tokens, FinishReason.STOP)))
    assert [chunk["choices"][0].get("token_ids") for chunk in chunks] == [None, tokens, None, None]


@pytest.mark.parametrize(
    ("text", "last"),
    [("so it", {"content": "t"}), ("<t>hm", {"content": ""}), ("<c>f|{}</c>", {"content": ""})],
)
def test_calls_and_thoughts_are_told_before_the_choice_is_finished(
    text: str, last: dict[str, str]
) -> None:
    chat = Chat(OutputRules(primary_eos=EOS, make_parser=TinyParser))
    cuts = range(len(ids(text)))  # the end comes with the last token
    assert shapes(chat, text, cuts)[-1][0] == last


def map_tokens(text: str) -> list[str]:
    chat = Chat()
    return [piece.text for piece in chat.run(frames(ids(text), FinishReason.LENGTH, range(50)))]


def test_running_usage_counts_thoughts_too() -> None:
    chat = Chat(OutputRules(primary_eos=EOS, make_parser=partial(TinyParser, thinking=True)))
    pieces = chat.run(frames([*ids("hm"), EOS], FinishReason.STOP, range(50)))
    chunks = chat.chunks(pieces, include_usage=True, continuous_usage=True)
    seen = [chunk["usage"]["completion_tokens_details"]["reasoning_tokens"] for chunk in chunks]
    assert seen == sorted(seen)
    assert seen[-1] == len(ids("hm"))
    assert chunks[-1]["choices"] == []
    assert [c["usage"]["completion_tokens"] for c in chunks][-1] == len(ids("hm")) + 1


def test_prompt_ids_come_once() -> None:
    chunks = Chat().chunks(Chat().run(frames([*ids("ab"), EOS], FinishReason.STOP, range(9))))
    assert chunks[0]["prompt_token_ids"] == list(PROMPT)
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
