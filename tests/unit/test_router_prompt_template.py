"""Templates: what they can do, what they cannot, and how hostile ones end."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import jinja2.sandbox
import pytest

from contracts.errors import ConfigurationError, InvalidRequest, Overloaded
from router.prompt_request import PromptRequest
from router.template import ChatTemplate, Rendered, asks_for_text, loops_over_content
from router.template_sandbox import TemplateSandbox

DOUBLING = (
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}"
)
USER: dict[str, Any] = {"role": "user", "content": "hi"}


def render(source: str, *messages: dict[str, Any], **fields: Any) -> Rendered:
    request = PromptRequest(messages=messages or [USER], **fields)
    return ChatTemplate(source, {"bos_token": "<s>"}).render(request, timeout_s=30)


# What a template is


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
    assert ChatTemplate(source, {}).wants_parts is wants_parts
    assert ChatTemplate(source, {}, content_format="openai").wants_parts
    assert not ChatTemplate(source, {}, content_format="string").wants_parts


@pytest.mark.parametrize(
    ("source", "tests"),
    [
        ("{% if m.content is string %}{% endif %}", True),
        ("{% set c = m['content'] %}{% if c is not string %}{% endif %}", True),
        ("{% if m.name is string %}{% endif %}", False),
        ("{% if m.content is none %}{% endif %}", False),
    ],
)
def test_which_templates_take_texts_too(source: str, tests: bool) -> None:
    assert asks_for_text(jinja2.Environment().parse(source)) is tests


@pytest.mark.parametrize("source", ["\n{% if %}", "\n{{ 1 | nothing }}", "\n{% endfor %}"])
def test_a_syntax_error_is_named_with_its_line(source: str) -> None:
    with pytest.raises(ConfigurationError, match="line 2"):
        ChatTemplate(source, {})


@pytest.mark.parametrize("source", ["{{ " + "[" * 100_000, "{{ " + "(" * 500 + "1" + ")" * 500])
def test_what_no_parser_can_nest(source: str) -> None:
    with pytest.raises(ConfigurationError, match="chat template"):
        ChatTemplate(source, {})


# What it sees


def test_variables() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}, "x": 2}}]
    documents = [{"title": "t", "text": "x"}]
    source = (
        "{{ [tools, documents, add_generation_prompt, continue_final_message, bos_token, "
        "reasoning_effort, enable_thinking] | tojson }}{{ unknown is defined }}"
    )
    kwargs = {"reasoning_effort": "low", "enable_thinking": False, "odd": object()}
    shown = render(source, tools=tools, documents=documents, template_kwargs=kwargs)
    assert shown.text == (
        '[[{"type": "function", "function": {"name": "f", "parameters": {"a": 1}, "x": 2}}], '
        '[{"title": "t", "text": "x"}], true, false, "<s>", "low", false]False'
    )


def test_kwargs_replace_special_tokens_but_no_field_of_the_request() -> None:
    kwargs = {"bos_token": "B", "messages": [], "tools": 1, "add_generation_prompt": False}
    source = "{{ bos_token }}{{ messages | length }}{{ tools }}{{ add_generation_prompt }}"
    assert render(source, template_kwargs=kwargs).text == "B1NoneTrue"


def test_names_the_template_does_not_use_are_dropped() -> None:
    kwargs = {"x": 1, "self": 2, "context": 3, "environment": 4, "range": 5}
    assert (
        render("{{ x }}{% for i in [6] %}{{ i }}{% endfor %}", template_kwargs=kwargs).text == "16"
    )


def test_developer() -> None:
    messages = [{"role": "developer", "content": "a"}]
    source = "{{ messages[0].role }}"
    assert render(source, *messages).text == "system"
    assert render(source + "{# developer #}", *messages).text == "developer"


def test_last_message() -> None:
    parts = {"role": "critic", "content": ["a", {"type": "text", "text": "b"}]}
    shown = render("x", USER, parts)
    assert (shown.last_role, shown.last_text) == ("critic", "a\nb")


# Continuing the last message

SHOWN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{{ tail }}"


@pytest.mark.parametrize(
    ("source", "content", "text"),
    [
        (SHOWN, "so", "[user]hi</s>[assistant]so"),
        (SHOWN, "so \n", "[user]hi</s>[assistant]so \n"),
        (SHOWN, "", "[user]hi</s>[assistant]"),
        (SHOWN, "hi</s>", "[user]hi</s>[assistant]hi</s>"),
        (SHOWN, ["a", "b "], "[user]hi</s>[assistant]a\nb "),
        (SHOWN.replace("m.content", "m.content | trim"), " so \n", "[user]hi</s>[assistant]so"),
        (SHOWN.replace("m.content", "' ' + m.content | trim"), "", "[user] hi</s>[assistant] "),
        (SHOWN.replace("]{{", "]\n{{").replace("m.content", "m.content|trim"), "", None),
    ],
)
def test_continue_final_message(source: str, content: Any, text: str | None) -> None:
    last = {"role": "assistant", "content": content}
    fields: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    shown = render(source, USER, last, template_kwargs={"tail": "later"}, **fields)
    assert shown.text == (text or "[user]\nhi</s>[assistant]\n")


@pytest.mark.parametrize(
    ("source", "last", "message"),
    [
        ("{{ messages[0].content }}", {"role": "assistant", "content": "x"}, "unchanged"),
        (SHOWN.replace("m.content", "m.content|upper"), {"role": "a", "content": "x"}, "unchanged"),
        (SHOWN.replace("m.content", "m.content[:3]"), {"role": "a", "content": "long"}, "unch"),
        (SHOWN, {"role": "assistant", "content": None}, "no content"),
        (SHOWN, {"role": "assistant", "tool_calls": []}, "no content"),
        (SHOWN, {"role": "developer", "content": "x"}, "in front"),
        ("{% for p in messages[1].content %}{% endfor %}", {"role": "a", "content": []}, "no text"),
    ],
)
def test_what_cannot_be_continued(source: str, last: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        render(source, USER, last, add_generation_prompt=False, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


# Limits


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
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ lipsum(1000) }}",
        "{% include 'x' %}",
    ],
)
def test_sandbox_and_failing_templates_are_the_callers_400(source: str) -> None:
    with pytest.raises(InvalidRequest):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}",
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        DOUBLING,
        "{% macro m() %}{{ caller() }}{% endmacro %}{% for a in range(90000) %}"
        "{% call m() %}{% endcall %}{% endfor %}",
    ],
)
def test_time_limit_even_where_nothing_is_said(source: str) -> None:
    times = iter(range(10_000))
    with pytest.raises(InvalidRequest, match="longer than 5 s"):
        ChatTemplate(source, {}).render(
            PromptRequest([USER]), timeout_s=5, clock=lambda: float(next(times))
        )


def test_size_limit() -> None:
    template = ChatTemplate("{% for a in range(90000) %}xx{% endfor %}", {})
    with pytest.raises(InvalidRequest, match="more than 99 characters") as caught:
        template.render(PromptRequest([USER]), timeout_s=30, max_chars=99)
    assert caught.value.param == "input_text"


# Templates that clients send


@pytest.fixture(scope="module")
def sandbox() -> Iterator[TemplateSandbox]:
    sandbox = TemplateSandbox(timeout_s=1.0)
    yield sandbox
    sandbox.close()


async def ask(sandbox: TemplateSandbox, source: str, **fields: Any) -> Rendered:
    request = PromptRequest(**{"messages": [USER], **fields}, chat_template=source)
    return await sandbox.render(request, {"bos_token": "<s>"}, max_chars=1 << 20)


async def test_a_child_renders_what_we_render(sandbox: TemplateSandbox) -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% endfor %}"
        "{{ [tools, documents, add_generation_prompt, x] | tojson }}"
    )
    fields: dict[str, Any] = {
        "messages": ({"role": "user", "content": "é🙂 \x00"},),
        "tools": [{"type": "function"}],
        "documents": [{"title": "a"}],
        "add_generation_prompt": False,
        "template_kwargs": {"x": [1.5, None, "<"]},
    }
    ours = ChatTemplate(source, {"bos_token": "<s>"}).render(PromptRequest(**fields), timeout_s=30)
    assert await ask(sandbox, source, **fields) == ours
    goes_on = {"add_generation_prompt": False, "continue_final_message": True}
    assert (await ask(sandbox, SHOWN, **goes_on)).text == "[user]hi"


HOSTILE = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | list | sort | length }}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ ['a'] * 10**10 }}",
    "{{ messages[0].content * 10**10 }}",
    "{{ (999999999 ** 999999) ** 9999 }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 'a' | indent(10**10) }}",
    "{% set ns = namespace(s='aaaaaaaa') %}"
    "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    DOUBLING,
    "{% for i in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
    "{{ " + "[" * 100_000,
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% if %}",
    "a" * ((1 << 18) + 1),
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_templates_end_and_block_nobody(
    sandbox: TemplateSandbox, source: str
) -> None:
    started = time.monotonic()
    task = asyncio.create_task(ask(sandbox, source))
    longest_s = 0.0
    while not task.done():
        before = time.monotonic()
        await asyncio.sleep(0.001)
        longest_s = max(longest_s, time.monotonic() - before)
    with pytest.raises(InvalidRequest) as caught:
        await task
    assert caught.value.param in ("chat_template", "input_text")
    assert len(str(caught.value)) < 400
    assert time.monotonic() - started < 30  # the child's limit is one second; machines are busy
    assert longest_s < 5
    assert (await ask(sandbox, "{{ messages[0].content }}")).text == "hi"


async def test_the_templates_refusal_and_bad_messages_pass_through(
    sandbox: TemplateSandbox,
) -> None:
    with pytest.raises(InvalidRequest, match=r"^no$"):
        await ask(sandbox, "{{ raise_exception('no') }}")
    with pytest.raises(InvalidRequest, match="needs a role") as caught:
        await ask(sandbox, "x", messages=[{}])
    assert caught.value.param == "messages"


async def test_who_waits_too_long_is_sent_away() -> None:
    sandbox = TemplateSandbox(processes=1, timeout_s=0.5)
    first = asyncio.create_task(ask(sandbox, HOSTILE[1]))
    await asyncio.sleep(0)
    others = [asyncio.create_task(ask(sandbox, HOSTILE[6])) for _ in range(70)]
    results = await asyncio.gather(first, *others, return_exceptions=True)
    sandbox.close()
    assert isinstance(results[0], InvalidRequest)
    assert all(isinstance(result, InvalidRequest | Overloaded) for result in results)
    assert sum(isinstance(result, Overloaded) for result in results) >= 60


async def test_closing_ends_a_child_at_work() -> None:
    sandbox = TemplateSandbox(timeout_s=300)
    assert (await ask(sandbox, "x")).text == "x"
    task = asyncio.create_task(ask(sandbox, HOSTILE[1]))
    while sandbox._idle:  # noqa: ASYNC110 - a thread takes it
        await asyncio.sleep(0)
    sandbox.close()
    with pytest.raises((InvalidRequest, asyncio.CancelledError)):
        await asyncio.wait_for(task, 30)
