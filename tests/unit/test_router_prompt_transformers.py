"""The same prompts as transformers makes, for every option that shapes one."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from cluster.demo_model import ensure_demo_model
from contracts.errors import InvalidRequest
from router.prompt import ChatPrompts
from router.prompt_request import PromptRequest
from tests.support.chat_templates import LLAMA_LIKE, MISTRAL_LIKE, QWEN_LIKE
from tests.support.fake_worker import CHATML, write_model_folder

TEMPLATES = {"chatml": CHATML, "qwen": QWEN_LIKE, "llama": LLAMA_LIKE, "mistral": MISTRAL_LIKE}
FAMILIES = ["demo", *TEMPLATES]
TEMPLATES["parts"] = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message['content'] -%}
{% if part.type == 'text' %}{{ part.text }}{% endif %}
{%- endfor %}<|im_end|>
{% endfor %}"""
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells <the> weather & more, 'quoted'",
            "parameters": {"type": "object", "properties": {"città": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
DOCUMENTS = [{"title": "Sea", "text": "It is <blue>."}, {"title": "Sky", "text": "Azul é."}]
CALL_ARGUMENTS = {"città": "Zürich", "n": [1, None, 2.5]}


def call(arguments: object) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"id": "abcdefgh9", "type": "function", "function": function}


def conversation(arguments: object) -> dict[str, list[dict[str, Any]]]:
    """Conversations by name; a call's arguments are text for us, an object for transformers."""
    user = {"role": "user", "content": "What is it <like> there?"}
    asked = {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}
    told = {"role": "tool", "tool_call_id": "abcdefgh9", "name": "weather", "content": '{"t": 3}'}
    return {
        "one": [user],
        "system": [{"role": "system", "content": " Be brief. 🙂\n"}, user],
        "turns": [
            {"role": "system", "content": "S"},
            user,
            {"role": "assistant", "content": "  Cold.\n"},
            {"role": "user", "content": "<|im_end|> and then?"},
        ],
        "calls": [user, asked, told],
        "answered": [
            user,
            asked,
            told,
            {"role": "assistant", "content": "It is cold."},
            {"role": "user", "content": "Thanks"},
        ],
        "thoughts": [
            user,
            {"role": "assistant", "content": "Cold.", "reasoning_content": "Alps, so\n"},
        ],
        "prefill": [user, {"role": "assistant", "content": "It is "}],
        "prefill-open-thoughts": [user, {"role": "assistant", "content": "<think>\nwell"}],
        "prefill-question": [{"role": "user", "content": "Tell me"}],
    }


TO_US = conversation(json.dumps(CALL_ARGUMENTS))
TO_THEM = conversation(CALL_ARGUMENTS)


@cache
def model(folder: Path, family: str) -> tuple[ChatPrompts, PreTrainedTokenizerFast]:
    if family == "demo":
        ensure_demo_model(folder / family)
    else:
        write_model_folder(folder / family, template=TEMPLATES[family])
        file = folder / family / "tokenizer_config.json"
        bos = {"__type": "AddedToken", "content": "<|endoftext|>"}
        file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": bos}))
    path = folder / family
    return ChatPrompts.load(path), PreTrainedTokenizerFast.from_pretrained(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


async def both(
    models: Path,
    family: str,
    name: str,
    *,
    add_generation_prompt: bool = True,
    tools: Any = None,
    documents: Any = None,
    **kwargs: Any,
) -> tuple[str, str]:
    """Our prompt and theirs as text, or the refusal's first words."""
    prompts, reference = model(models, family)
    request = PromptRequest(
        messages=TO_US[name],
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=kwargs.pop("continue_final_message", False),
        template_kwargs=kwargs,
    )
    ours: list[int] | str
    theirs: list[int] | str
    try:
        ours = list((await prompts.encode(request, max_model_len=100_000)).ids)
    except InvalidRequest as error:
        ours = str(error)[:30]
    try:
        encoded = reference.apply_chat_template(
            TO_THEM[name],
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=request.continue_final_message,
            tokenize=True,
            return_dict=True,
            **kwargs,
        )
        theirs = list(encoded["input_ids"])
    except Exception as error:
        theirs = str(error)[:30]
    if isinstance(ours, str) or isinstance(theirs, str):
        return str(ours), str(theirs)
    return prompts.decode(ours), prompts.decode(theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", list(TO_US))
@pytest.mark.parametrize("generate", [True, False], ids=["open", "closed"])
async def test_conversations(models: Path, family: str, name: str, generate: bool) -> None:
    ours, theirs = await both(models, family, name, add_generation_prompt=generate)
    assert ours == theirs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["one", "system", "turns", "calls", "answered"])
async def test_tools(models: Path, family: str, name: str) -> None:
    ours, theirs = await both(models, family, name, tools=TOOLS)
    assert ours == theirs
    assert ("<the> weather" in ours) is (family != "chatml")


@pytest.mark.parametrize("family", FAMILIES)
async def test_documents(models: Path, family: str) -> None:
    ours, theirs = await both(models, family, "one", documents=DOCUMENTS)
    assert ours == theirs
    assert ("It is <blue>." in ours) is (family in ("demo", "mistral"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name", ["turns", "thoughts", "prefill", "prefill-open-thoughts", "prefill-question"]
)
async def test_continue_final_message(models: Path, family: str, name: str) -> None:
    ours, theirs = await both(
        models, family, name, add_generation_prompt=False, continue_final_message=True
    )
    assert ours == theirs
    assert ours.rstrip().endswith(TO_US[name][-1]["content"].strip())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"enable_thinking": False},
        {"enable_thinking": True},
        {"date_string": "2 Feb 2026", "tools_in_user_message": False},
        {"reasoning_effort": "high"},
        {"bos_token": "<|im_end|>", "nobody": ["uses this"]},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
async def test_template_kwargs(models: Path, family: str, kwargs: dict[str, Any]) -> None:
    ours, theirs = await both(models, family, "system", tools=TOOLS, **kwargs)
    assert ours == theirs


@pytest.mark.parametrize("family", ["parts", "llama"])
@pytest.mark.parametrize("goes_on", [False, True])
async def test_contents_in_parts(models: Path, family: str, goes_on: bool) -> None:
    prompts, reference = model(models, family)
    parts = [{"type": "text", "text": " a"}, {"type": "text", "text": "b "}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    request = PromptRequest(
        messages=messages, add_generation_prompt=not goes_on, continue_final_message=goes_on
    )
    theirs = reference.apply_chat_template(
        messages, add_generation_prompt=not goes_on, continue_final_message=goes_on, tokenize=False
    )
    built = await prompts.encode(request, max_model_len=1000)
    assert prompts.decode(built.ids) == theirs
    assert theirs.endswith("b ") is goes_on


async def test_special_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    token = "<|endoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    prompts = ChatPrompts.load(folder)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    text = reference.apply_chat_template(TO_THEM["one"], tokenize=False)
    for add in (False, True):
        request = PromptRequest(TO_US["one"], add_generation_prompt=False, add_special_tokens=add)
        built = await prompts.encode(request, max_model_len=1000)
        assert list(built.ids) == reference(text, add_special_tokens=add)["input_ids"]
        plain = await prompts.encode_text("the cat", add_special_tokens=add, max_model_len=1000)
        assert list(plain) == reference("the cat", add_special_tokens=add)["input_ids"]
        assert (plain[0] == tokenizer.token_to_id(token)) is add
    assert prompts.token_ids("the cat") == tuple(
        reference("the cat", add_special_tokens=False)["input_ids"]
    )


async def test_a_refusal_is_in_the_templates_own_words(models: Path) -> None:
    prompts, _ = model(models, "mistral")
    request = PromptRequest(messages=[{"role": "assistant", "content": "first"}])
    with pytest.raises(InvalidRequest, match=r"^questions and answers must take turns"):
        await prompts.encode(request, max_model_len=1000)
