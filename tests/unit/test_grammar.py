"""Compiling in a child process: bounded in time and memory, shared, and gone at the end."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.demo_model import ensure_demo_model
from contracts.errors import InvalidRequest, Overloaded, Unavailable
from contracts.sampling import Grammar, GrammarKind
from engine.grammar import GrammarCompiler
from engine.grammar_matcher import ReadyGrammar
from tests.support.grammar_walks import VOCAB_SIZE, Walker

# Takes ten seconds to compile.
HOSTILE = Grammar(GrammarKind.REGEX, "|".join(f"[a-z]{{1,{i}}}x" for i in range(200, 400)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_model(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="module")
def compiler(model: Path) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(model, VOCAB_SIZE, (2, 0), time_limit_s=1.0)
    yield compiler
    compiler.close()


def choice(*texts: str) -> Grammar:
    return Grammar(GrammarKind.CHOICE, json.dumps(texts))


async def test_what_the_child_compiles_is_used_here(compiler: GrammarCompiler, model: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    first = await compiler.compile(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)))
    second = await compiler.compile(Grammar(GrammarKind.REGEX, "(?i)ab"))
    walker = Walker(model)
    assert walker.takes(first, '{"a": 1}')
    assert not walker.takes(first, '{"a": "1"}')
    assert walker.takes(second, "aB")
    assert len(compiler.child_pids) == 1
    assert compiler.child_pids[0] != os.getpid()


async def test_equal_grammars_are_compiled_once(compiler: GrammarCompiler) -> None:
    plain = choice("once")
    late = Grammar(GrammarKind.CHOICE, plain.text, start_after=(5,), end_token_ids=(7,))
    found = await asyncio.gather(*(compiler.compile(one) for one in (plain, late, plain)))
    found.append(await compiler.compile(plain))
    assert all(isinstance(one, ReadyGrammar) for one in found)
    ready = [one for one in found if isinstance(one, ReadyGrammar)]
    assert len({id(one.text) for one in ready}) == 1
    assert [one.end_token_ids for one in ready] == [(2, 0), (7,), (2, 0), (2, 0)]


async def test_refusals_have_a_reason_and_are_remembered(compiler: GrammarCompiler) -> None:
    bad = Grammar(GrammarKind.EBNF, 'root ::= "a" nowhere')
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="nowhere") as caught:
            await compiler.compile(bad)
        assert caught.value.param is None
    with pytest.raises(InvalidRequest, match="characters at most"):
        await compiler.compile(Grammar(GrammarKind.JSON_SCHEMA, " " * (1 << 21)))


async def test_a_hostile_one_is_killed_and_the_next_is_served(compiler: GrammarCompiler) -> None:
    await compiler.compile(choice("before"))
    before = compiler.child_pids
    hostile = asyncio.create_task(compiler.compile(HOSTILE))
    await asyncio.sleep(0)  # it is queued first
    after = await compiler.compile(choice("after"))
    assert hostile.done(), "one lane, so in order"
    with pytest.raises(InvalidRequest, match="more than 1 s"):
        await hostile
    assert after.matcher() is not None
    assert compiler.child_pids != before
    assert not psutil.pid_exists(before[0])


async def test_who_goes_away_does_not_take_the_others_grammar(compiler: GrammarCompiler) -> None:
    shared = choice("shared")
    leaving = asyncio.create_task(compiler.compile(shared))
    staying = asyncio.create_task(compiler.compile(shared))
    await asyncio.sleep(0)
    leaving.cancel()
    assert isinstance(await staying, ReadyGrammar)
    assert leaving.cancelled()


async def test_a_child_that_dies_is_replaced(compiler: GrammarCompiler) -> None:
    await compiler.compile(choice("alive"))
    os.kill(compiler.child_pids[0], signal.SIGKILL)
    assert isinstance(await compiler.compile(choice("lucky")), ReadyGrammar)


async def test_a_slow_one_has_nobody_waiting_behind_it(model: Path) -> None:
    compiler = GrammarCompiler(model, VOCAB_SIZE, (2,), max_pending=2)
    slow = asyncio.create_task(compiler.compile(HOSTILE))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(compiler.compile(choice("quick")))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await compiler.compile(choice("too many"))
    assert isinstance(await waiting, ReadyGrammar)
    assert not slow.done()
    assert len(compiler.child_pids) == 2
    children = [psutil.Process(pid) for pid in compiler.child_pids]
    compiler.close()
    compiler.close()
    with pytest.raises(Unavailable):
        await slow
    with pytest.raises(Unavailable):
        await compiler.compile(choice("late"))
    assert not any(child.is_running() for child in children)


async def test_memory_is_bounded_and_nothing_is_left(model: Path) -> None:
    me = psutil.Process()
    compiler = GrammarCompiler(model, VOCAB_SIZE, (2,), memory_limit_bytes=8 << 20, cache_bytes=1)
    files = me.num_fds()
    with pytest.raises(InvalidRequest, match="8 MiB of memory"):
        await compiler.compile(HOSTILE)
    ready = [await compiler.compile(choice("kept")) for _ in range(2)]
    texts = [one.text for one in ready if isinstance(one, ReadyGrammar)]
    assert texts[0] is not texts[1], "the cache has room for one byte"
    children = [psutil.Process(pid) for pid in compiler.child_pids]
    assert children
    compiler.close()
    assert not any(child.is_running() for child in children)
    assert compiler.child_pids == ()
    assert me.num_fds() == files


def test_nothing_is_started_before_it_is_needed(model: Path) -> None:
    compiler = GrammarCompiler(model, VOCAB_SIZE, (2,))
    assert compiler.child_pids == ()
    compiler.close()
    compiler.warm()
    assert compiler.child_pids == ()


async def test_a_model_without_a_tokenizer_file(tmp_path: Path) -> None:
    compiler = GrammarCompiler(tmp_path, VOCAB_SIZE, (2,))
    with pytest.raises(InvalidRequest, match=r"structured output needs tokenizer\.json"):
        await compiler.compile(choice("a"))
    compiler.close()
