import json
import time
from pathlib import Path
from typing import Any

import jinja2.nodes
import jinja2.sandbox
import pytest
from transformers import PreTrainedTokenizerFast

from contracts.errors import ConfigurationError, InvalidRequest
from router.messages import template_messages
from router.prompt import ChatPrompts
from router.template import ChatTemplate, loops_over_content
from tests.support.fake_worker import CHATML, write_model_folder

RICH = """{{- bos_token }}
{%- set ns = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- if message['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- elif message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- call.function | tojson }}
            {{- call.function.arguments | tojson(indent=2) }}
        {%- endfor %}
    {%- elif message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim }}{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
    {%- endif %}
    {%- if ns.turns > 8 %}{% break %}{% endif %}
{%- endfor %}
{{- strftime_now('%Y')[:2] }}
{%- if tools is not none %}TOOLS{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PARTS = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message['content'] -%}
{% if part.type == 'text' %}{{ part.text }}{% endif %}
{%- endfor %}
{%- endif %}<|im_end|>
{% endfor %}"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": 'Be <brief> & "kind".'},
        {"role": "user", "content": "  ¿qué? 🙂 \n"},
        {"role": "assistant", "content": "<b>ok</b>"},
        {"role": "skip", "content": "never"},
        {"role": "user", "content": "<|im_end|> injected"},
    ],
    [
        {"role": "user", "content": "call"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"a<": "é'\""}}}
            ],
        },
        {"role": "tool", "content": "42"},
    ],
]


@pytest.mark.parametrize("template", [CHATML, RICH, PARTS], ids=["chatml", "rich", "parts"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["short", "long", "tools"])
async def test_same_ids_as_transformers(
    tmp_path: Path, template: str, messages: list[dict[str, Any]]
) -> None:
    folder = write_model_folder(tmp_path / "model", template=template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["bos_token"] = {"__type": "AddedToken", "content": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    encoded = reference.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = await ChatPrompts.load(folder).encode(messages, max_model_len=10_000)
    assert list(ids) == list(encoded["input_ids"])


async def test_long_prompts_give_the_same_in_a_thread(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    messages = [{"role": "user", "content": "the cat sat " * 50}]
    inline = await ChatPrompts.load(folder).encode(messages, max_model_len=10_000)
    threaded = await ChatPrompts.load(folder, inline_chars=10).encode(
        messages, max_model_len=10_000
    )
    assert inline == threaded


@pytest.mark.parametrize("over", [0, 1, 500])
async def test_too_long_prompt_names_both_numbers(tmp_path: Path, over: int) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path))
    messages = [{"role": "user", "content": "the cat"}]
    count = len(await prompts.encode(messages, max_model_len=1000))
    assert len(await prompts.encode(messages, max_model_len=count + 1)) == count
    messages = [{"role": "user", "content": "the cat" + " é" * over}]
    real = len(await prompts.encode(messages, max_model_len=10_000))
    with pytest.raises(InvalidRequest, match=rf"{real} tokens.*{count} tokens") as caught:
        await prompts.encode(messages, max_model_len=count)
    assert caught.value.param == "input_tokens"


async def test_huge_texts_are_refused_before_tokenising(tmp_path: Path) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path))
    messages = [{"role": "user", "content": "x" * 1_100_000}]
    with pytest.raises(InvalidRequest, match="100 tokens") as caught:
        await prompts.encode(messages, max_model_len=100)
    assert caught.value.param == "input_text"


def test_end_tokens(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    prompts = ChatPrompts.load(folder)
    name = prompts.vocabulary.name
    assert prompts.primary_eos is not None
    assert name(prompts.primary_eos) == "<|im_end|>"
    assert [name(i) for i in prompts.secondary_eos] == ["<|endoftext|>"]
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    (folder / "config.json").write_text('{"eos_token_id": [4]}')
    prompts = ChatPrompts.load(folder)
    assert (prompts.primary_eos, prompts.secondary_eos) == (3, (4,))


def test_generation_config_defaults(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    values = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 9}
    (folder / "generation_config.json").write_text(json.dumps(values))
    defaults = ChatPrompts.load(folder).defaults
    got = (defaults.temperature, defaults.top_p, defaults.top_k, defaults.max_tokens)
    assert got == (0.6, 0.9, 20, 9)


@pytest.mark.parametrize(
    ("remove", "message"),
    [("tokenizer.json", "save_pretrained"), ("chat_template.jinja", "chat_template.jinja")],
)
def test_a_missing_file_says_what_to_do(tmp_path: Path, remove: str, message: str) -> None:
    folder = write_model_folder(tmp_path)
    (folder / remove).unlink()
    with pytest.raises(ConfigurationError, match=message):
        ChatPrompts.load(folder)


@pytest.mark.parametrize(
    "value",
    ["named", [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]],
)
async def test_template_in_the_tokenizer_config(tmp_path: Path, value: object) -> None:
    folder = write_model_folder(tmp_path)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    prompts = ChatPrompts.load(folder)
    ids = await prompts.encode([{"role": "user", "content": "x"}], max_model_len=100)
    assert prompts.vocabulary.tokenizer.decode(list(ids)) == "named"


def test_a_broken_template_is_named_at_load(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="line 2"):
        ChatPrompts.load(write_model_folder(tmp_path, template="\n{% if %}"))


@pytest.mark.parametrize(
    ("source", "wants_parts"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% for p in m.content %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% for p in m['content'] | list %}{% endfor %}{% endfor %}", True),
        (
            "{% for m in messages %}{% set c = m.content %}"
            "{% for p in c %}{% endfor %}{% endfor %}",
            True,
        ),
        ("{% for m in messages %}{% for p in m.content.split() %}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% for c in m.tool_calls %}{% endfor %}{% endfor %}", False),
    ],
)
def test_content_format(source: str, wants_parts: bool) -> None:
    tree = jinja2.sandbox.ImmutableSandboxedEnvironment().parse(source)
    assert loops_over_content(tree) is wants_parts


def render(source: str, *contents: str) -> str:
    messages = [{"role": "user", "content": content} for content in contents]
    return ChatTemplate(source, {}).render(messages, timeout_s=30)


def test_the_templates_own_words_are_the_message() -> None:
    with pytest.raises(InvalidRequest, match=r"^roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[9].content.x }}",
        "{{ 1 / 0 }}",
    ],
)
def test_sandbox_and_failing_templates_are_the_callers_400(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source, "x")


def test_time_limit() -> None:
    source = "{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}"
    times = iter(range(10_000))
    with pytest.raises(InvalidRequest, match="longer than 5 s"):
        ChatTemplate(source, {}).render([], timeout_s=5, clock=lambda: float(next(times)))


async def test_time_limit_of_a_template_that_says_nothing(tmp_path: Path) -> None:
    source = "{% for a in range(3000) %}{% for b in range(300) %}{% endfor %}{% endfor %}x"
    prompts = ChatPrompts.load(
        write_model_folder(tmp_path, template=source), inline_chars=0, timeout_s=0.001
    )
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match="longer than"):
        await prompts.encode([{"role": "user", "content": "x"}], max_model_len=100)
    prompts.close()
    assert time.monotonic() - started < 60


# Messages


def normal(*messages: dict[str, Any], parts: bool = False, developer: bool = False) -> Any:
    return template_messages(messages, as_parts=parts, knows_developer=developer)


def test_text_parts_of_all_kinds() -> None:
    content = [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
        {"type": "thinking", "thinking": "e"},
        "f",
    ]
    message = {"role": "user", "content": content}
    assert normal(message)[0]["content"] == "a\nb\nc\nd\ne\nf"
    assert normal(message, parts=True)[0]["content"] == [
        {"type": "text", "text": letter} for letter in "abcdef"
    ]


@pytest.mark.parametrize("message", [{"role": "x"}, {"role": "x", "content": None}])
def test_no_content_is_empty(message: dict[str, Any]) -> None:
    assert normal(message)[0] == {"role": "x", "content": ""}
    assert normal(message, parts=True)[0] == {"role": "x", "content": []}


@pytest.mark.parametrize(
    "message",
    [
        {"content": "x"},
        {"role": "", "content": "x"},
        {"role": 3, "content": "x"},
        {"role": "user", "content": 3},
        {"role": "user", "content": {"type": "text"}},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": [{"text": "x"}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": ["text"], "text": "x"}]},
        {"role": "user", "content": [None]},
        {"role": "assistant", "tool_calls": "x"},
        {"role": "assistant", "tool_calls": [{"type": "other", "function": {}}]},
    ],
)
def test_bad_messages(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\]") as caught:
        normal(message)
    assert caught.value.param == "messages"


def test_no_messages() -> None:
    with pytest.raises(InvalidRequest):
        normal()


def test_developer_becomes_system_where_the_template_does_not_know_it() -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "hi"},
        {"role": "developer", "content": "b"},
    ]
    assert [m["role"] for m in normal(*messages, developer=True)] == ["system", "user", "developer"]
    assert normal(*messages) == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "hi"},
    ]
    assert ChatTemplate("{{ 'developer' }}", {}).knows_developer


@pytest.mark.parametrize(
    ("sent", "seen"), [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("{broken", {}), ("[1]", {})]
)
def test_arguments_of_earlier_calls_are_objects(sent: object, seen: object) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": sent}}
    message = normal({"role": "assistant", "content": None, "tool_calls": [call]})[0]
    assert message["tool_calls"][0]["function"]["arguments"] == seen
    assert "tool_calls" not in normal({"role": "assistant", "tool_calls": []})[0]


def test_what_is_passed_on() -> None:
    message = normal({"role": "tool", "tool_call_id": "1", "name": "f", "content": "x", "odd": 1})[
        0
    ]
    assert message == {"role": "tool", "tool_call_id": "1", "name": "f", "content": "x"}
    for key in ("reasoning", "reasoning_content"):
        message = normal({"role": "assistant", "content": "x", key: "why"})[0]
        assert (message["reasoning"], message["reasoning_content"]) == ("why", "why")
