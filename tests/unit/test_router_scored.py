"""Requests whose prompt is scored, beams, and what else travels to the workers."""

from functools import partial
from pathlib import Path

import pytest

from contracts.errors import EngineFailure, InvalidRequest
from contracts.events import FinishReason, PromptScores, TokensOut
from router.rules import OutputRules
from tests.support.fake_worker import FakeWorker, scores_of, until
from tests.support.router_request import (
    LENGTH,
    TEXT,
    TOKENIZER,
    Run,
    fake,
    nothing_left,
    router,
    script,
)
from tests.support.tiny_parser import TinyParser

PROMPT_IDS = tuple(TOKENIZER.encode("the prompt").ids)


def scored(run: Run) -> bool:
    """Whether all scores are there, as the worker sent them."""
    entries = run.generation.prompt_entries()
    if entries is None:
        return False
    expected = scores_of(PROMPT_IDS, 2)
    assert [(e.logprob, e.rank) for e in entries[1:]] == [(e.logprob, e.rank) for e in expected]
    tops = [tuple((i, value) for i, _, value in e.top) for e in entries[1:]]
    assert tops == [e.top for e in expected]
    return True


# Prompt log-probabilities


@pytest.mark.parametrize("aggregated", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 100])
async def test_a_scored_prompt(tmp_path: Path, aggregated: bool, max_tokens: int) -> None:
    p, d = fake("p"), fake("d")
    async with router(tmp_path, p, d, aggregated=aggregated) as r:
        run = r.start(prompt_logprobs=2, max_tokens=max_tokens)
        await run.some()
        assert scored(run)  # with the first piece, not just at the end
        await run.rest()
    assert len(run.tokens()) == min(LENGTH, max_tokens)
    entries = run.generation.prompt_entries()
    assert entries is not None
    assert [entry.token_id for entry in entries] == list(PROMPT_IDS)
    assert "".join(entry.token for entry in entries) == "the prompt"
    assert [len(entry.top) for entry in entries] == [0] + [2] * (len(PROMPT_IDS) - 1)


async def test_unasked_for_there_are_none(tmp_path: Path) -> None:
    d = fake("d")
    async with router(tmp_path, d, aggregated=True) as r:
        run = await r.start().rest()
    assert run.generation.prompt_entries() is None


async def test_decode_tokens_wait_for_scores_that_they_overtook(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    p.pause_at = 0
    async with router(tmp_path, p, d) as r:
        run = r.start(prompt_logprobs=2)
        await until(lambda: d.running == 0 and d.adopted)
        assert run.tokens() == []
        p.resume()
        await run.rest()
    assert scored(run)
    assert run.text() == TEXT + "0"
    assert p.aborted == d.aborted == []


@pytest.mark.parametrize("lost", ["before-the-tokens", "after-the-tokens"])
async def test_a_prefill_worker_gone_with_the_scores_means_another_attempt(
    tmp_path: Path, lost: str
) -> None:
    p1, p2, d = fake("p1"), fake("p2"), fake("d")
    p1.pause_at = 0
    early = lost == "before-the-tokens"
    d.pause_at = 0 if early else None
    async with router(tmp_path, p1, p2, d) as r:
        run = r.start(prompt_logprobs=2)
        await until(lambda: d.paused.is_set() if early else d.running == 0 and d.adopted)
        p1.session.lose()
        d.resume()
        await run.rest()
        assert r.count("baton:retries_total") == 1
    assert scored(run)
    assert p2.submitted[0][0].params.prompt_logprobs == 2
    assert p2.submitted[0][0].output_ids == ()
    assert run.text() == TEXT + "0"


async def test_a_decode_worker_that_computes_the_prompt_itself_scores_it(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    p.pause_at = d.pause_at = 0
    async with router(tmp_path, p, d) as r:
        run = r.start(prompt_logprobs=2)
        await until(lambda: d.paused.is_set())
        p.session.lose()
        request = d.adopted[0][0]
        entries = scores_of(request.prompt_ids, 2)
        d.session.send(PromptScores(request.request_id, 0, 1, entries))
        d.resume()
        await run.rest()
    assert scored(run)
    assert len(d.adopted) == 1
    assert d.submitted == []


@pytest.mark.parametrize("path", ["remote", "local", "one-token"])
async def test_missing_scores_are_a_failure(tmp_path: Path, path: str) -> None:
    p, d = fake("p"), fake("d")
    p.withhold_scores = d.withhold_scores = True
    max_tokens = 1 if path == "one-token" else 100
    async with router(tmp_path, p, d, aggregated=path == "local") as r:
        run = r.start(prompt_logprobs=0, max_tokens=max_tokens)
        with pytest.raises(EngineFailure, match="log-probabilities"):
            await run.rest()
        await until(lambda: nothing_left(p, d))
    assert run.pieces == []


async def test_scores_of_no_prompt_token_are_a_failure(tmp_path: Path) -> None:
    d = fake("d")
    d.pause_at = 0
    d.withhold_scores = True
    async with router(tmp_path, d, aggregated=True) as r:
        run = r.start(prompt_logprobs=0)
        await until(lambda: d.paused.is_set())
        entries = scores_of(PROMPT_IDS, 0)
        d.session.send(PromptScores(d.submitted[0][0].request_id, 0, 2, entries))
        with pytest.raises(EngineFailure, match="prompt tokens"):
            await run.rest()


async def test_a_replay_scores_only_what_is_not_known(tmp_path: Path) -> None:
    d1, d2 = fake("d1"), fake("d2")
    d1.fail_kind_at = 3
    async with router(tmp_path, d1, d2, aggregated=True) as r:
        run = await r.start(prompt_logprobs=2).rest()
    assert d1.submitted[0][0].params.prompt_logprobs == 2
    assert d2.submitted[0][0].params.prompt_logprobs is None
    assert scored(run)
    assert run.text() == TEXT + "0"


async def test_pieces_of_scores_from_two_attempts_add_up(tmp_path: Path) -> None:
    d1, d2 = fake("d1"), fake("d2")
    d1.pause_at = 0
    d1.withhold_scores = True
    async with router(tmp_path, d1, d2, aggregated=True) as r:
        run = r.start(prompt_logprobs=2)
        await until(lambda: d1.paused.is_set())
        first = scores_of(PROMPT_IDS, 2)[:1]
        d1.session.send(PromptScores(d1.submitted[0][0].request_id, 0, 1, first))
        d1.session.lose()
        await run.rest()
    assert d2.submitted[0][0].params.prompt_logprobs == 2
    assert scored(run)


# Beams


@pytest.mark.parametrize("aggregated", [False, True])
async def test_beams_come_at_the_end(tmp_path: Path, aggregated: bool) -> None:
    p, d = fake("p"), fake("d")
    async with router(tmp_path, p, d, aggregated=aggregated) as r:
        run = await r.start(beam=True, n=3, logprobs=1).rest()
    assert [(piece.choice, piece.first, piece.finish_reason) for piece in run.pieces] == [
        (i, True, "stop") for i in range(3)
    ]
    assert [run.text(i) for i in range(3)] == [TEXT + str(i) for i in range(3)]
    assert all(len(piece.logprobs) == LENGTH for piece in run.pieces)
    assert run.generation.usage.completion_tokens == 3 * LENGTH
    assert p.aborted == d.aborted == []


@pytest.mark.parametrize("n", [1, 2])
async def test_candidates_are_not_shown(tmp_path: Path, n: int) -> None:
    p, d = fake("p"), fake("d", lambda request, choice: script(request, choice)[1:])
    async with router(tmp_path, p, d) as r:
        run = await r.start(beam=True, n=n).rest()
    assert run.tokens() == list(script(p.submitted[0][0], 0))[1:]


async def test_beams_that_end_with_their_first_tokens_need_no_decode_worker(
    tmp_path: Path,
) -> None:
    p, d = fake("p"), fake("d")
    async with router(tmp_path, p, d) as r:
        run = await r.start(beam=True, n=2, max_tokens=1).rest()
    assert [len(piece.token_ids) for piece in run.pieces] == [1, 1]
    assert (d.submitted, d.adopted, p.aborted) == ([], [], [])


@pytest.mark.parametrize("told", [0, 1])
async def test_beams_start_again_from_the_prompt(tmp_path: Path, told: int) -> None:
    """Also when some have been told: another worker's need not be the same."""
    d1, d2 = fake("d1"), fake("d2")
    d1.pause_at = 4
    async with router(tmp_path, d1, d2, aggregated=True) as r:
        run = r.start(beam=True, n=2)
        await until(lambda: d1.paused.is_set())
        rid = d1.submitted[0][0].request_id
        for index in range(told):
            d1.session.send(TokensOut(rid, 0, index, 0, (7, 8), finish=FinishReason.LENGTH))
        d1.session.lose()
        await run.rest()
        assert r.count("baton:retries_total") == 1
    request = d2.submitted[0][0]
    assert (request.output_ids, request.finished) == ((), ())
    assert [run.text(i) for i in range(2)] == [TEXT + "0", TEXT + "1"]


async def test_a_worker_that_drains_gives_beams_up(tmp_path: Path) -> None:
    d1, d2 = fake("d1"), fake("d2")
    d1.pause_at = 2
    async with router(tmp_path, d1, d2, aggregated=True) as r:
        run = r.start(beam=True, n=2)
        await until(lambda: d1.paused.is_set())
        rid = d1.submitted[0][0].request_id
        d1.session.send(TokensOut(rid, 0, 0, 0, (), finish=FinishReason.ABORT))
        await run.rest()
    assert [run.text(i) for i in range(2)] == [TEXT + "0", TEXT + "1"]


# What travels


async def test_salt_and_priority_reach_every_worker(tmp_path: Path) -> None:
    p, d = fake("p"), fake("d")
    d.fail_kind_at = 2
    d2 = fake("d2")
    async with router(tmp_path, p, d, d2) as r:
        await r.start(cache_salt="pepper", priority=-7).rest()
    requests = [p.submitted[0][0], d.adopted[0][0], d2.submitted[0][0]]
    assert [(q.cache_salt, q.priority) for q in requests] == [("pepper", -7)] * 3


@pytest.mark.parametrize("who", ["p", "d"])
@pytest.mark.parametrize("param", ["structured_outputs", ""])
async def test_the_field_at_fault_is_named(tmp_path: Path, who: str, param: str) -> None:
    workers: dict[str, FakeWorker] = {"p": fake("p"), "d": fake("d")}
    workers[who].fail_kind, workers[who].fail_param = "InvalidRequest", param
    async with router(tmp_path, *workers.values()) as r:
        run = r.start()
        with pytest.raises(InvalidRequest) as caught:
            await run.rest()
        await until(lambda: nothing_left(*workers.values()))
    assert caught.value.param == (param or None)


@pytest.mark.parametrize("include", [True, False])
async def test_thoughts_are_counted_over_all_choices(tmp_path: Path, include: bool) -> None:
    parser = partial(TinyParser, thinking=True)
    rules = OutputRules(make_parser=parser, thinks=True, include_reasoning=include)
    d = fake("d")
    async with router(tmp_path, d, aggregated=True) as r:
        run = await r.start(n=2, rules=rules).rest()
        assert r.count("vllm:generation_tokens_total") == 2 * LENGTH
    usage = run.generation.usage
    assert usage.reasoning_tokens == usage.completion_tokens - 2  # all but the ends
    assert run.pieces[-1].reasoning_tokens == usage.reasoning_tokens
