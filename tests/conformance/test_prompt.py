"""Messages and all fields that shape the prompt, seen through its token ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.conformance import QUESTION, Api, text_of

field = pytest.mark.field
PLAIN = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def rendered(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


@field("messages")
@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "system", "content": "Be kind."}, rendered("system", "Be kind.")),
        ({"role": "developer", "content": "Be kind."}, rendered("system", "Be kind.")),
        ({"role": "critic", "content": "Hm."}, rendered("critic", "Hm.")),
        ({"role": "user", "content": ""}, rendered("user", "")),
        ({"role": "user", "content": "A", "name": "eve"}, "<|im_start|>user (eve)\nA<|im_end|>\n"),
        (
            {"role": "user", "content": [{"type": "text", "text": "A"}]},
            rendered("user", "A"),
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("A", "B")]},
            rendered("user", "A\nB"),
        ),
        (
            {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."},
            rendered("assistant", "<think>Hm.</think>Yes."),
        ),
        (
            {"role": "assistant", "content": "Yes.", "reasoning": "Hm."},
            rendered("assistant", "<think>Hm.</think>Yes."),
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call-1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"a": "ü"}'},
                    }
                ],
            },
            rendered("assistant", '<tool_call>f {"a": "ü"} call-1</tool_call>'),
        ),
        (
            {"role": "tool", "tool_call_id": "call-1", "content": "42"},
            rendered("tool", "42 for call-1"),
        ),
        (
            {"role": "function", "name": "f", "content": "42"},
            "<|im_start|>function (f)\n42<|im_end|>\n",
        ),
    ],
    ids=lambda value: value.get("role") if isinstance(value, dict) else None,
)
def test_message_forms(api: Api, message: dict[str, Any], shown: str) -> None:
    first = {"role": "user", "content": QUESTION}
    order = [message, first] if message["role"] in ("system", "developer") else [first, message]
    texts = {id(first): rendered("user", QUESTION), id(message): shown}
    want = "".join(texts[id(one)] for one in order) + "<|im_start|>assistant\n"
    assert api.prompt(messages=order) == want


@field("messages")
def test_what_a_user_sent_changes_the_answer(api: Api) -> None:
    assert text_of(api.chat("One thing.")) != text_of(api.chat("Another thing."))


@field("add_generation_prompt", "response.choices.message.role")
def test_add_generation_prompt(api: Api) -> None:
    assert api.prompt() == PLAIN
    assert api.prompt(add_generation_prompt=False) == rendered("user", QUESTION)
    answer = api.chat(add_generation_prompt=False)
    assert answer["choices"][0]["message"]["role"] == "user"


@field("continue_final_message")
def test_continue_final_message(api: Api) -> None:
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "The sea is"},
    ]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    want = rendered("user", QUESTION) + "<|im_start|>assistant\nThe sea is"
    assert api.prompt(messages=messages, **fields) == want
    assert api.chat(messages=messages, **fields)["choices"][0]["message"]["role"] == "assistant"


@field("documents")
def test_documents(api: Api) -> None:
    documents = [{"title": "Sea", "text": "Salt."}, {"title": "Sky", "text": "Air."}]
    want = rendered("system", "Documents: [Sea] Salt. [Sky] Air.") + PLAIN
    assert api.prompt(documents=documents) == want


@field("chat_template")
def test_chat_template(api: Api) -> None:
    template = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{% endfor %}!"
    assert api.prompt(chat_template=template) == f"USER: {QUESTION}!"


@field("chat_template_kwargs")
def test_chat_template_kwargs(api: Api) -> None:
    kwargs = {"mood": "sunny", "unused": [1]}
    assert api.prompt(chat_template_kwargs=kwargs) == rendered("system", "Mood: sunny") + PLAIN
    thoughtless = api.prompt(chat_template_kwargs={"enable_thinking": False})
    assert thoughtless == PLAIN + "<think>\n\n</think>\n\n"


@field("reasoning_effort")
@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_reasoning_effort(api: Api, effort: str) -> None:
    want = rendered("system", f"Effort: {effort}") + PLAIN
    assert api.prompt(reasoning_effort=effort) == want


@field("reasoning_effort")
def test_reasoning_effort_none_turns_thinking_off(api: Api) -> None:
    assert api.prompt(reasoning_effort="none").endswith("<think>\n\n</think>\n\n")


@field("mm_processor_kwargs")
def test_mm_processor_kwargs(api: Api) -> None:
    """A text model has no processor: what would have an effect elsewhere is refused."""
    assert api.prompt(mm_processor_kwargs={}) == PLAIN
    refusal = api.refused(mm_processor_kwargs={"num_crops": 4})
    assert (refusal.status, refusal.error["param"]) == (400, "mm_processor_kwargs")


@field("truncate_prompt_tokens")
def test_truncate_prompt_tokens(api: Api) -> None:
    whole = api.prompt_ids()
    assert api.prompt_ids(truncate_prompt_tokens=5) == whole[-5:]
    assert api.prompt_ids(truncate_prompt_tokens=500) == whole
    assert api.prompt_ids(truncate_prompt_tokens=-1) == whole
    assert api.chat(truncate_prompt_tokens=5)["usage"]["prompt_tokens"] == 5
    long = api.chat("sea " * 5000, truncate_prompt_tokens=-1, max_tokens=4)
    assert long["usage"]["prompt_tokens"] < 4096
    assert long["usage"]["total_tokens"] <= 4096


@field("tools")
def test_tools_reach_the_template(api: Api) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for choice in ("auto", "none"):
        prompt = api.prompt(tools=[tool], tool_choice=choice)
        assert prompt.startswith("<|im_start|>system\nTools: {")
        assert '"name": "f"' in prompt
        assert prompt.endswith(PLAIN)


@field("add_special_tokens")
def test_add_special_tokens(
    api: Api, own_server: Callable[..., Any], variant: Callable[..., Path]
) -> None:
    """The demo model's tokenizer adds nothing, so this one is told to begin with token 0."""
    assert api.prompt(add_special_tokens=True) == PLAIN
    name = "<|endoftext|>"
    text = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [0], "tokens": [name]}},
    }
    other, _ = own_server(model=variant("tokenizer.json", post_processor=processor))
    bare = other.prompt_ids()
    assert bare == api.prompt_ids()
    assert other.prompt_ids(add_special_tokens=True) == [0, *bare]


@field("model", "response.model")
def test_model(api: Api, only_baton: None) -> None:
    answer = api.chat()
    for name in ("also-demo", "", None):
        other = api.chat(model=name)
        assert other["model"] == api.model
        assert text_of(other) == text_of(answer)
    refusal = api.refused(model="no-such-model")
    assert (refusal.status, refusal.error["type"]) == (404, "NotFoundError")
    assert refusal.error["param"] == "model"


@field("user")
def test_user_changes_nothing(api: Api) -> None:
    assert text_of(api.chat(user="someone")) == text_of(api.chat())
    assert api.prompt(user="someone") == PLAIN
    assert api.refused(user=5).status == 400


def test_tokenize_gives_the_same_prompt(api: Api) -> None:
    message = {"role": "user", "content": QUESTION}
    body = {"model": api.model, "messages": [message]}
    tokens = api.post("/tokenize", body)["tokens"]
    assert tokens == api.prompt_ids()
    assert api.post("/detokenize", {"model": api.model, "tokens": tokens})["prompt"] == PLAIN
