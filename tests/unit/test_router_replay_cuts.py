"""A stream that is cut and replayed at each of its positions is the stream that was never cut."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from contracts.request import GenerationRequest
from router.deltas import OutputParser
from router.parsers.registry import make_output_parser
from router.pieces import Gathered
from router.rules import OutputRules
from tests.support.fake_worker import FakeWorker, until
from tests.support.parsed import auto
from tests.support.router_request import EOS, TOKENIZER, Run, fake, nothing_left, router

THOUGHTS = "<think>\nHm — 2 €?\n</think>\n\n"
CALLS = (
    'So <tool_call>\n{"name": "now", "arguments": {"at": "ü"}}\n</tool_call>'
    '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
)


@cache
def tokens_of(text: str) -> list[int]:
    return [*TOKENIZER.encode(text).ids, EOS]


def hermes() -> OutputParser:
    parser = make_output_parser(
        reasoning="qwen3", tools=auto("hermes"), tail="", template_kwargs={}
    )
    assert parser is not None
    return parser


@dataclass(frozen=True)
class Case:
    """One choice's text each; what is asked for."""

    texts: Sequence[str]
    stop: tuple[str, ...] = ()
    make_parser: Callable[[], OutputParser] | None = None
    include_reasoning: bool = True
    params: dict[str, Any] = field(default_factory=dict[str, Any])

    def tokens(self, request: GenerationRequest, choice: int) -> list[int]:
        return tokens_of(self.texts[choice])

    @property
    def length(self) -> int:
        return max(len(tokens_of(text)) for text in self.texts)

    @property
    def rules(self) -> OutputRules:
        return OutputRules(
            self.stop,
            EOS,
            make_parser=self.make_parser,
            thinks=self.make_parser is not None,
            include_reasoning=self.include_reasoning,
        )


CASES = {
    "text": Case(["the cat — 🙂 sat über"]),
    "choices": Case(["the cat", "🙂", "", "the mat and then"], params={"n": 4, "seed": 1}),
    "logprobs": Case(["the 🙂 cat"] * 2, params={"n": 2, "logprobs": 2}),
    "stop": Case(["the cat sat on the mat and"], ("sat on the mat",)),
    "nearly-stop": Case(["the cat sat on the cat sat on x"], ("sat on the mat", "on xyz")),
    "calls": Case([THOUGHTS + CALLS], make_parser=hermes),
    "calls-and-stop": Case([CALLS + " the end of it", "no call"], ("end of",), hermes, False),
    "thoughts-hidden": Case([THOUGHTS + "the end"], (), hermes, False, {"logprobs": 1}),
    "cut-short": Case(["the cat sat on the mat"], params={"max_tokens": 7, "n": 1}),
    "prompt-scores": Case(["the cat"], params={"prompt_logprobs": 1}),
    "beams": Case(["the cat", "the mat", "then"], params={"n": 3, "beam": True, "logprobs": 0}),
}


def seen(run: Run) -> dict[str, object]:
    """All that a client can tell, apart from the ids of calls."""
    choices: dict[int, Gathered] = {}
    firsts: list[int] = []
    for piece in run.pieces:
        choices.setdefault(piece.choice, Gathered()).add(piece)
        firsts += [piece.choice] * piece.first
    return {
        "firsts": sorted(firsts),
        "usage": run.generation.usage,
        "scores": run.generation.prompt_entries(),
        "counts": (run.pieces[-1].completion_tokens, run.pieces[-1].reasoning_tokens),
        "choices": {
            index: (
                one.content,
                one.reasoning,
                [(call.name, call.arguments) for call in one.calls.values()],
                one.token_ids,
                one.entries,
                one.finish_reason,
                one.stop_reason,
            )
            for index, one in choices.items()
        },
    }


def workers(case: Case, tokens_per_frame: int = 1) -> list[FakeWorker]:
    made = [fake(name, case.tokens) for name in ("p", "d1", "d2", "d3")]
    for worker in made:
        worker.tokens_per_frame = tokens_per_frame
        worker.cached_tokens = 2
    for worker in made[2:]:
        worker.cached_tokens = 5  # of a later attempt: not the answer's
    return made


async def whole(tmp_path: Path, case: Case, **settings: Any) -> dict[str, object]:
    """The undisturbed stream."""
    async with router(tmp_path, *workers(case), **settings) as r:
        return seen(await r.start(rules=case.rules, **case.params).rest())


async def cut(tmp_path: Path, case: Case, at: int, **settings: Any) -> dict[str, object]:
    """The stream whose first D is lost at a position, and the second one two tokens later."""
    p, d1, d2, d3 = workers(case, 1 + at % 3)
    d1.pause_at, d2.pause_at = at, at + 2
    async with router(tmp_path, p, d1, d2, d3, **settings) as r:
        run = r.start(rules=case.rules, **case.params)
        rest = asyncio.create_task(run.rest())
        for worker in (d1, d2):
            await until(lambda worker=worker: worker.paused.is_set() or rest.done())  # type: ignore[misc]
            if worker.paused.is_set():
                worker.down = True
                worker.session.lose()
        await rest
        await until(lambda: nothing_left(p, d1, d2, d3))
        for worker in (d2, d3):
            for request, handoff in worker.submitted:
                assert request.attempt
                assert not handoff
                for choice, ids in enumerate(request.output_ids):
                    assert list(ids) == case.tokens(request, choice)[: len(ids)]
        return seen(run)


@pytest.mark.parametrize("aggregated", [True, False], ids=["local", "remote"])
@pytest.mark.parametrize("name", CASES)
async def test_cut_anywhere(tmp_path: Path, name: str, aggregated: bool) -> None:
    case = CASES[name]
    expected = await whole(tmp_path, case, aggregated=aggregated)
    # What is shown is cut alike on both paths, so one of them may leave some of many places out.
    step = 1 if aggregated or case.length < 40 else 7
    for at in range(0, case.length, step):
        assert await cut(tmp_path, case, at, aggregated=aggregated) == expected, f"cut at {at}"
