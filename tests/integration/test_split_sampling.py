"""Every rule of a draw gives the same tokens split, on D alone, cold and warm; token 1 included."""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from contracts.events import FinishReason
from contracts.ids import new_request_id
from contracts.request import GenerationRequest
from contracts.sampling import Grammar, GrammarKind, ProcessorSpec, SamplingParams
from tests.support.byte_tokenizer import END, add_byte_tokenizer, text_of
from tests.support.logit_tricks import NAMES
from tests.support.reference import stock_model
from tests.support.split_cluster import Answer, SplitCluster, split_cluster
from tests.support.tiny_models import VOCAB, build_tiny

NEW = 16
TRICKS = "tests.support.logit_tricks."
ALLOWED: dict[str, object] = {"logits_processor_pattern": NAMES}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny("llama", tmp_path_factory.mktemp("models") / "llama")
    add_byte_tokenizer(folder)
    return folder


def prompt_of(name: str, length: int) -> list[int]:
    draw = random.Random(name)
    return [draw.randrange(2, VOCAB) for _ in range(length)]


PROMPT = prompt_of("sampling", 37)
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0)
SEEDED = SamplingParams(max_tokens=NEW, temperature=1.0, seed=2**63 + 11)

RULES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "frequency": {"frequency_penalty": 1.3},
    "presence": {"presence_penalty": -2.0},
    "penalties": {
        "repetition_penalty": 0.8,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.9,
        "logprobs": 2,
    },
    "bias": {"logit_bias": ((7, 5.0), (9, 4.5), (11, -100.0)), "logprobs": 0},
    "allowed": {"allowed_token_ids": tuple(range(20, 60)), "logprobs": 3},
    "min_p": {"min_p": 0.2, "top_k": 50},
    "min_tokens": {
        "min_tokens": 5,
        "min_tokens_masked": tuple(range(2, 200)),
        "eos_token_ids": tuple(range(2, 200)),
    },
    "function": {"processors": (ProcessorSpec(TRICKS + "prefer_even"),)},
    "class": {
        "processors": (ProcessorSpec(TRICKS + "Descend", args="[200]", kwargs='{"width": 40}'),),
        "logprobs": 1,
    },
}


def outcome(answer: Answer) -> tuple[object, ...]:
    """What must not depend on the path; log-probabilities up to rounding."""
    told = [[round(entry.logprob, 3) for entry in entries] for entries in answer.logprobs]
    ids = [[[token for token, _ in e.top] for e in entries] for entries in answer.logprobs]
    return answer.failure, answer.tokens, answer.finish, told, ids


async def everywhere(
    cluster: SplitCluster, prompt: list[int], cases: dict[str, SamplingParams]
) -> dict[str, Answer]:
    """Each case split and on D alone, without and with prefix hits; all must agree."""
    rounds = []
    for split, salt in ((True, "a"), (True, "a"), (False, "b"), (False, "b")):
        answers = await asyncio.gather(
            *(cluster.generate(prompt, p, split=split, salt=salt) for p in cases.values())
        )
        assert {a.failure for a in answers} == {""}
        assert {a.path for a in answers} <= {"remote" if split else "local", ""}
        rounds.append(dict(zip(cases, answers, strict=True)))
    for name in cases:
        found = [outcome(answers[name]) for answers in rounds]
        assert found == [found[0]] * 4, name
    return rounds[0]


@pytest.mark.parametrize("n", [1, 3])
async def test_rules_hold_on_every_path(llama: Path, n: int) -> None:
    async with split_cluster(llama, prefill=ALLOWED, decode=ALLOWED) as cluster:
        plain = await everywhere(
            cluster, PROMPT, {"greedy": GREEDY, "seeded": replace(SEEDED, n=n)}
        )
        words = {
            name: (tuple(answer.tokens[0][:1]), tuple(answer.tokens[0][3:5]), (300, 301))
            for name, answer in plain.items()
        }
        cases = {"greedy-words": replace(GREEDY, bad_words=words["greedy"])}
        cases["seeded-words"] = replace(SEEDED, n=n, bad_words=words["seeded"])
        for name, rule in RULES.items():
            cases[f"greedy-{name}"] = replace(GREEDY, **rule)
            cases[f"seeded-{name}"] = replace(SEEDED, n=n, **rule)
        found = await everywhere(cluster, PROMPT, cases)
        for name, answer in found.items():  # each rule has done something
            before = plain[name.partition("-")[0]].tokens
            if not name.endswith("min_p"):
                assert answer.tokens != before, name
        for tokens in found["seeded-allowed"].tokens:
            assert set(tokens) <= set(range(20, 60))
        for tokens in found["seeded-min_tokens"].tokens:
            assert len(tokens) > 5
            assert not set(tokens[:5]) & set(range(2, 200))
        assert plain["greedy"].tokens[0][0] != found["greedy-words"].tokens[0][0]
        await cluster.idle()


GRAMMARS = {
    "schema": Grammar(
        GrammarKind.JSON_SCHEMA,
        json.dumps(
            {
                "type": "object",
                "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}},
                "required": ["a", "b"],
            }
        ),
        any_whitespace=False,
    ),
    "object": Grammar(GrammarKind.JSON_OBJECT),
    "regex": Grammar(GrammarKind.REGEX, "[ab]{4}c?d"),
    "choice": Grammar(GrammarKind.CHOICE, '["yes", "no", "perhaps"]'),
    "ebnf": Grammar(GrammarKind.EBNF, 'root ::= "x" [0-9]{3} "y"'),
    "lark": Grammar(GrammarKind.LARK, "start: /[a-c]{3}/ WORD\nWORD: /(on|off)/"),
    "tag": Grammar(
        GrammarKind.STRUCTURAL_TAG,
        json.dumps(
            {
                "type": "structural_tag",
                "format": {
                    "type": "tag",
                    "begin": "<<",
                    "content": {"type": "json_schema", "json_schema": {"type": "boolean"}},
                    "end": ">>",
                },
            }
        ),
    ),
    "empty": Grammar(GrammarKind.REGEX, ""),
}


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_grammars_hold_on_every_path(llama: Path, ignore_eos: bool) -> None:
    eos = () if ignore_eos else (END,)
    cases = {}
    for name, grammar in GRAMMARS.items():
        bound = replace(grammar, end_token_ids=(END,))
        rule: dict[str, Any] = {"grammar": bound, "eos_token_ids": eos, "max_tokens": 24}
        cases[f"greedy-{name}"] = replace(GREEDY, **rule)
        cases[f"seeded-{name}"] = replace(SEEDED, n=3, logprobs=1, **rule)
    async with split_cluster(llama) as cluster:
        found = await everywhere(cluster, PROMPT, cases)
        for name, answer in found.items():
            for tokens, finish in zip(answer.tokens, answer.finish, strict=True):
                text = text_of(tokens)
                if "object" in name:
                    assert text.startswith("{")
                    continue
                assert tokens[-1] == END, (name, text)
                assert finish is FinishReason.STOP
                if "choice" in name:
                    assert text in ("yes", "no", "perhaps")
                elif "schema" in name:
                    assert set(json.loads(text)) == {"a", "b"}
        assert found["seeded-empty"].tokens == [[END]] * 3, "token 1 on P ends it all"
        await cluster.idle()


async def test_a_replay_goes_on_within_its_grammar(llama: Path) -> None:
    grammar = replace(GRAMMARS["schema"], end_token_ids=(END,))
    params = replace(
        SEEDED, n=2, grammar=grammar, max_tokens=30, frequency_penalty=0.3, eos_token_ids=(END,)
    )
    async with split_cluster(llama) as cluster:
        whole = await cluster.generate(PROMPT, params)
        assert whole.failure == ""
        for cut in (1, 3, 7):
            known = tuple(tuple(tokens[:cut]) for tokens in whole.tokens)
            again = await cluster.generate(PROMPT, params, split=False, output_ids=known)
            assert again.tokens == whole.tokens
            assert again.finish == whole.finish
        await cluster.idle()


def by_hand(folder: Path, frequency: float, presence: float) -> list[int]:
    """Greedy tokens under penalties, as their definition says."""
    model = stock_model(folder, "llama")
    tokens: list[int] = []
    for _ in range(NEW):
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPT + tokens])).logits[0, -1].float()
        counts = torch.bincount(torch.tensor(tokens, dtype=torch.int64), minlength=len(logits))
        logits = logits - frequency * counts - presence * (counts > 0)
        tokens.append(int(logits.argmax()))
    return tokens


@pytest.mark.parametrize("split", [True, False])
async def test_greedy_rules_are_those_of_transformers(llama: Path, split: bool) -> None:
    def reference(**options: Any) -> list[int]:
        found = stock_model(llama, "llama").generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones((1, len(PROMPT)), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NEW,
            **options,
        )
        tokens: list[int] = found[0, len(PROMPT) :].tolist()
        return tokens

    plain = reference()
    bias = ((plain[0], -8.0), (5, 6.5))
    words = ((plain[1],), (plain[2], plain[3]))
    end = plain[4]
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"repetition_penalty": 1.6}, reference(repetition_penalty=1.6)),
        (
            {"logit_bias": bias},
            reference(sequence_bias={(token,): value for token, value in bias}),
        ),
        ({"bad_words": words}, reference(bad_words_ids=[list(word) for word in words])),
        (
            {"min_tokens": 8, "min_tokens_masked": (end,), "eos_token_ids": (end,)},
            reference(min_new_tokens=8, eos_token_id=end),
        ),
        ({"frequency_penalty": 1.5}, by_hand(llama, 1.5, 0.0)),
        ({"presence_penalty": 1.9}, by_hand(llama, 0.0, 1.9)),
        ({"frequency_penalty": -0.6, "presence_penalty": 0.7}, by_hand(llama, -0.6, 0.7)),
    ]
    async with split_cluster(llama) as cluster:
        for rule, truth in cases:
            answer = await cluster.generate(PROMPT, replace(GREEDY, **rule), split=split)
            assert answer.tokens[0] == truth, rule
        await cluster.idle()


@pytest.mark.parametrize("step", [64, 2048])
async def test_prompt_scores_are_those_of_the_model(llama: Path, step: int) -> None:
    sizes: dict[str, object] = {"max_step_tokens": step, "kv_memory_bytes": 12 << 20}
    params = replace(GREEDY, max_tokens=3, prompt_logprobs=3)
    async with split_cluster(llama, prefill=sizes, decode=sizes) as cluster:
        prompts = [prompt_of(f"scores{length}", length) for length in (1, 2, 16, 17, 257, 700)]
        requests = [(prompt, split) for prompt in prompts for split in (True, False)]
        for _ in range(2):  # the second time with warm caches
            answers = await asyncio.gather(
                *(cluster.generate(prompt, params, split=split) for prompt, split in requests)
            )
            for (prompt, _), answer in zip(requests, answers, strict=True):
                assert answer.failure == ""
                assert answer.cached_tokens == 0
                check_scores(llama, prompt, answer, 3)
        plain = await cluster.generate(prompts[-1], GREEDY)
        assert plain.cached_tokens == 688, "a scored prompt is remembered for others"
        await cluster.idle()


def check_scores(folder: Path, prompt: list[int], answer: Answer, k: int) -> None:
    with torch.inference_mode():
        logits = stock_model(folder, "llama")(torch.tensor([prompt])).logits[0]
    truth = torch.log_softmax(logits.float(), dim=-1)
    assert sorted(answer.scores) == list(range(1, len(prompt)))
    for position, entry in answer.scores.items():
        row = truth[position - 1]
        own = float(row[prompt[position]])
        assert entry.logprob == pytest.approx(own, abs=1e-4)
        assert entry.rank == 1 + int((row > own).sum())
        best = torch.topk(row, k)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [score for _, score in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


async def test_a_replay_is_scored_once(llama: Path) -> None:
    prompt = prompt_of("again", 100)
    params = replace(GREEDY, max_tokens=8, prompt_logprobs=1, n=2)
    async with split_cluster(llama) as cluster:
        whole = await cluster.generate(prompt, params, split=False)
        known = tuple(tuple(tokens[:4]) for tokens in whole.tokens)
        again = await cluster.generate(prompt, params, split=False, output_ids=known)
        assert again.tokens == whole.tokens
        check_scores(llama, prompt, again, 1)
        await cluster.idle()


async def test_priority_goes_first_on_p(llama: Path) -> None:
    """Ten prompts at once on a P that computes one a step: tokens come by priority."""
    order: list[int] = []
    async with split_cluster(llama, prefill={"max_running": 1}) as cluster:
        requests = []
        for number, priority in enumerate([5, 3, 9, 0, -4, 7, 3, -4, 1, 8]):
            prompt = tuple(prompt_of(f"p{number}", 60))
            params = replace(GREEDY, max_tokens=1)
            request = GenerationRequest(new_request_id(), prompt, params, priority=priority)
            requests.append(request)
        by_id = {request.request_id: request.priority for request in requests}
        cluster.on_event = lambda worker, event: (
            order.append(by_id[event.request_id])
            if getattr(event, "finish", None) is not None
            else None
        )
        await asyncio.gather(*(cluster.send(request, split=True) for request in requests))
        assert order[1:] == sorted(order[1:]), "the first may run before the others are known"
        await cluster.idle()
