"""From a request to token ids: templates, limits, plain texts."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import ConfigurationError, InvalidRequest
from router.prompt import ChatPrompts
from router.prompt_request import BuiltPrompt, PromptRequest
from router.template_sandbox import TemplateSandbox
from tests.support.fake_worker import write_model_folder


async def encode(prompts: ChatPrompts, text: str, **fields: Any) -> BuiltPrompt:
    max_model_len = fields.pop("max_model_len", 10_000)
    request = PromptRequest(messages=[{"role": "user", "content": text}], **fields)
    return await prompts.encode(request, max_model_len=max_model_len)


async def text_of(prompts: ChatPrompts, text: str = "x", **fields: Any) -> str:
    return prompts.decode((await encode(prompts, text, **fields)).ids)


# Chats


async def test_long_prompts_give_the_same_in_a_thread(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    content = "the cat sat " * 50
    inline = await encode(ChatPrompts.load(folder), content)
    threaded = await encode(ChatPrompts.load(folder, inline_chars=10), content)
    assert inline == threaded


@pytest.mark.parametrize("over", [0, 1, 500])
async def test_too_long_prompt_names_both_numbers(tmp_path: Path, over: int) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path))
    count = len((await encode(prompts, "the cat")).ids)
    assert len((await encode(prompts, "the cat", max_model_len=count + 1)).ids) == count
    content = "the cat" + " é" * over
    real = len((await encode(prompts, content)).ids)
    with pytest.raises(InvalidRequest, match=rf"{real} tokens.*{count} tokens") as caught:
        await encode(prompts, content, max_model_len=count)
    assert caught.value.param == "input_tokens"
    assert len((await encode(prompts, content, max_model_len=None)).ids) == real


@pytest.mark.parametrize("chat_template", [None, "{{ messages[0].content }}"])
async def test_huge_texts_are_refused_before_tokenising(
    tmp_path: Path, chat_template: str | None
) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path))
    prompts.vocabulary.tokenizer.encode("warm")
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match="characters") as caught:
        await encode(prompts, "x" * 10_000_000, max_model_len=100, chat_template=chat_template)
    assert caught.value.param == "input_text"
    with pytest.raises(InvalidRequest, match="characters"):
        await prompts.encode_text("x" * 10_000_000, max_model_len=100)
    assert time.monotonic() - started < 5
    prompts.close()


@pytest.mark.parametrize("inline_chars", [0, 1000])
async def test_half_a_surrogate_pair(tmp_path: Path, inline_chars: int) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path), inline_chars=inline_chars)
    with pytest.raises(InvalidRequest, match="Unicode") as caught:
        await encode(prompts, "a\ud800b")
    assert caught.value.param == "messages"
    with pytest.raises(InvalidRequest, match="Unicode") as caught:
        await prompts.encode_text("a\ud800b", max_model_len=100)
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="Unicode"):
        prompts.token_ids("\udfff")
    prompts.close()


@pytest.mark.parametrize(
    ("truncate", "max_model_len", "kept"),
    [
        (None, 1000, 1000),
        (5, 1000, 5),
        (1, 1000, 1),
        (500, 1000, 500),
        (-1, 1000, 1000),
        (-1, 20, 19),
        (19, 20, 19),
        (-1, None, 1000),
        (7, None, 7),
    ],
)
async def test_truncation_keeps_the_tail(
    tmp_path: Path, truncate: int | None, max_model_len: int | None, kept: int
) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path))
    whole = (await encode(prompts, "the cat é " * 20)).ids
    assert 20 < len(whole) < 500
    built = await encode(
        prompts, "the cat é " * 20, truncate_prompt_tokens=truncate, max_model_len=max_model_len
    )
    assert built.ids == whole[-kept:]


@pytest.mark.parametrize(
    ("truncate", "message", "param"),
    [
        (0, "empty", "truncate_prompt_tokens"),
        (21, "context of 20 tokens", "truncate_prompt_tokens"),
        (20, "the prompt has 20 tokens", "input_tokens"),
    ],
)
async def test_truncation_that_cannot_be(
    tmp_path: Path, truncate: int, message: str, param: str
) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path))
    with pytest.raises(InvalidRequest, match=message) as caught:
        await encode(prompts, "cat " * 50, truncate_prompt_tokens=truncate, max_model_len=20)
    assert caught.value.param == param


async def test_a_template_that_says_nothing(tmp_path: Path) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path, template="{# nothing #}"))
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        await encode(prompts, "x")


@pytest.mark.parametrize(
    ("last_role", "generate", "role", "last_text"),
    [
        ("user", True, "assistant", ""),
        ("user", False, "user", "the end"),
        ("assistant", True, "assistant", "the end"),
        ("assistant", False, "assistant", "the end"),
        ("critic", False, "critic", "the end"),
    ],
)
async def test_role_and_last_text(
    tmp_path: Path, last_role: str, generate: bool, role: str, last_text: str
) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path))
    messages = [{"role": "user", "content": "q"}, {"role": last_role, "content": "the end"}]
    request = PromptRequest(messages, add_generation_prompt=generate)
    built = await prompts.encode(request, max_model_len=1000)
    assert (built.role, built.last_text) == (role, last_text)


async def test_tail(tmp_path: Path) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path))
    built = await encode(prompts, "long " * 500)
    assert built.tail.endswith("long <|im_end|>\n<|im_start|>assistant\n")
    assert len(built.tail) == 512
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    built = await encode(prompts, "<think>" + "long " * 500, **fields)
    assert "<think>" in built.tail


async def test_time_limit_of_a_template_that_says_nothing(tmp_path: Path) -> None:
    source = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}x"
    prompts = ChatPrompts.load(
        write_model_folder(tmp_path, template=source), inline_chars=0, timeout_s=0.2
    )
    started = time.monotonic()
    for _ in range(4):  # there are two threads: none of them is lost
        with pytest.raises(InvalidRequest, match="longer than"):
            await encode(prompts, "x")
    prompts.close()
    assert time.monotonic() - started < 60


# Which template


async def test_requests_bring_their_own(tmp_path: Path) -> None:
    sandbox = TemplateSandbox(timeout_s=20)
    prompts = ChatPrompts.load(write_model_folder(tmp_path), sandbox=sandbox)
    source = "{{ eos_token }}{{ messages[0].content }}{{ x }}{{ y }}"
    fields: dict[str, Any] = {"chat_template": source, "template_kwargs": {"x": "X", "y": "Z"}}
    assert await text_of(prompts, "hi", **fields) == "<|im_end|>hiXZ"
    built = await encode(prompts, "hi", truncate_prompt_tokens=2, **fields)
    assert prompts.decode(built.ids) == "XZ"
    with pytest.raises(InvalidRequest, match="line 1") as caught:
        await encode(prompts, "hi", chat_template="{% if %}")
    assert caught.value.param == "chat_template"
    prompts.close()


NAMED = [
    {"name": "tool_use", "template": "with tools"},
    {"name": "rag", "template": "{% broken"},
    {"name": "default", "template": "plain"},
]


@pytest.mark.parametrize(
    ("configured", "tools", "shown"),
    [
        ("plain", None, "plain"),
        ("plain", [{}], "plain"),
        (NAMED, None, "plain"),
        (NAMED, [{}], "with tools"),
        (NAMED[:1], [{}], "with tools"),
    ],
)
async def test_template_in_the_tokenizer_config(
    tmp_path: Path, configured: object, tools: Any, shown: str
) -> None:
    folder = write_model_folder(tmp_path)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": configured}))
    assert await text_of(ChatPrompts.load(folder), tools=tools) == shown


async def test_template_files(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, template="plain")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "older"}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    prompts = ChatPrompts.load(folder)
    assert await text_of(prompts) == "plain"
    assert await text_of(prompts, tools=[{}]) == "with tools"
    assert prompts.template_sources == ("plain", "with tools")
    other = tmp_path / "mine.jinja"
    other.write_text("mine {{ x }}")
    for option in (str(other), "mine {{ x }}"):
        prompts = ChatPrompts.load(folder, chat_template=option)
        assert prompts.template_sources == ("mine {{ x }}",)
        for tools in (None, [dict[str, Any]()]):
            assert await text_of(prompts, tools=tools) == "mine "
            kwargs = {"x": 2}
            assert await text_of(prompts, tools=tools, template_kwargs=kwargs) == "mine 2"


@pytest.mark.parametrize("option", ["no-such-file.jinja", "", "x" * 5000, "nul\0"])
def test_an_option_that_is_no_template(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigurationError, match="chat template option"):
        ChatPrompts.load(write_model_folder(tmp_path), chat_template=option)


async def test_a_model_without_a_template_takes_plain_prompts(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    (folder / "chat_template.jinja").unlink()
    prompts = ChatPrompts.load(folder)
    with pytest.raises(InvalidRequest, match="no chat template"):
        await encode(prompts, "x")
    assert await prompts.encode_text("x", max_model_len=10) == prompts.token_ids("x")


def test_a_broken_template_is_named_at_load(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="line 2"):
        ChatPrompts.load(write_model_folder(tmp_path, template="\n{% if %}"))


# The model's files


def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match="save_pretrained"):
        ChatPrompts.load(folder)


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


# Plain texts and ids


async def test_texts_and_ids(tmp_path: Path) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path))
    ids = prompts.token_ids("the cat é")
    for inline_chars in (0, 1000):
        prompts = ChatPrompts.load(write_model_folder(tmp_path), inline_chars=inline_chars)
        assert await prompts.encode_text("the cat é", max_model_len=100) == ids
        assert await prompts.encode_text(list(ids), max_model_len=100) == ids
        assert await prompts.encode_text(ids, truncate=2, max_model_len=100) == ids[-2:]
        assert await prompts.encode_text(ids, truncate=-1, max_model_len=3) == ids[-2:]
        prompts.close()
    assert prompts.decode(ids) == "the cat é"
    assert prompts.token_strs(prompts.token_ids("a é<|im_end|>")) == [
        "a",
        "Ġ",
        "Ã",
        "©",
        "<|im_end|>",
    ]
    marker = prompts.token_ids("<|im_end|>")
    assert prompts.decode(marker) == "<|im_end|>"


@pytest.mark.parametrize("prompt", ["", []])
async def test_nothing_is_no_prompt_but_can_be_counted(tmp_path: Path, prompt: Any) -> None:
    prompts = ChatPrompts.load(write_model_folder(tmp_path))
    assert await prompts.encode_text(prompt, max_model_len=None) == ()
    with pytest.raises(InvalidRequest, match="the prompt is empty") as caught:
        await prompts.encode_text(prompt, max_model_len=100)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("wrong", [-1, True, None])
async def test_ids_that_the_model_does_not_have(tmp_path: Path, wrong: int | None) -> None:
    folder = write_model_folder(tmp_path)
    (folder / "config.json").write_text('{"vocab_size": 400}')  # padded
    prompts = ChatPrompts.load(folder)
    assert await prompts.encode_text([399], max_model_len=100) == (399,)
    ids = [1, 400 if wrong is None else wrong]
    with pytest.raises(InvalidRequest, match="from 0 to 399") as caught:
        await prompts.encode_text(ids, max_model_len=100)
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="from 0 to 399") as caught:
        prompts.decode(ids)
    assert caught.value.param == "tokens"
    with pytest.raises(InvalidRequest, match="tokens has more than"):
        prompts.decode([1] * ((1 << 20) + 1))
