"""Arrivals and prompts: seeded, Poisson, distinct, and of the asked-for length."""

import json
from dataclasses import replace
from itertools import islice, takewhile

import pytest

from benchmarks.metrics import Phase, gap_cv, index_of_dispersion
from benchmarks.schedule import (
    WORDS,
    PlannedRequest,
    PromptScale,
    TokenRange,
    Workload,
)

WORKLOAD = Workload(
    model="m",
    rate_per_s=10.0,
    prompt_tokens=TokenRange(40, 40),
    output_tokens=TokenRange(8, 8),
    seed=1,
    salt="s",
    scale=PromptScale(overhead_tokens=10.0, tokens_per_word=1.5),
    warmup_s=5.0,
    duration_s=200.0,
)


def prompt(request: PlannedRequest) -> list[str]:
    text = json.loads(request.body)["messages"][0]["content"]
    assert isinstance(text, str)
    return text.split()


def fixed(workload: Workload) -> list[PlannedRequest]:
    """Warm-up and window."""
    return list(takewhile(lambda request: request.phase is not Phase.TAIL, workload.requests()))


def test_the_same_seed_and_salt_give_the_same_bytes() -> None:
    first, second = WORKLOAD.requests(), WORKLOAD.requests()
    assert list(islice(first, 3000)) == list(islice(second, 3000))


def test_the_salt_changes_prompts_but_no_arrival() -> None:
    one, other = fixed(WORKLOAD), fixed(replace(WORKLOAD, salt="t"))
    assert [r.intended_s for r in one] == [r.intended_s for r in other]
    assert all(a.body != b.body for a, b in zip(one, other, strict=True))
    reseeded = fixed(replace(WORKLOAD, seed=2))
    assert reseeded[0].intended_s != one[0].intended_s


def test_arrivals_are_poisson() -> None:
    arrivals = [request.intended_s for request in fixed(WORKLOAD) if request.intended_s >= 0]
    assert arrivals == sorted(arrivals)
    assert len(arrivals) == pytest.approx(2000, abs=4 * 2000**0.5)
    assert gap_cv(arrivals) == pytest.approx(1.0, abs=0.1)
    assert index_of_dispersion(arrivals, 200.0, 1.0) == pytest.approx(1.0, abs=0.4)


def test_phases_follow_the_clock() -> None:
    for request in islice(WORKLOAD.requests(), 2500):
        expected = (
            Phase.WARMUP
            if request.intended_s < 0
            else Phase.WINDOW
            if request.intended_s < 200.0
            else Phase.TAIL
        )
        assert request.phase is expected
    assert next(WORKLOAD.requests()).intended_s > -5.0
    assert WORKLOAD.window_s() == 200.0


def test_a_count_of_requests_ends_the_window_at_the_next_arrival() -> None:
    workload = replace(WORKLOAD, duration_s=None, num_requests=7)
    requests = list(islice(workload.requests(), 200))
    assert [request.phase for request in requests].count(Phase.WINDOW) == 7
    first_of_tail = next(request for request in requests if request.phase is Phase.TAIL)
    assert workload.window_s() == first_of_tail.intended_s


def test_prompts_have_the_asked_length_and_share_nothing() -> None:
    requests = fixed(WORKLOAD)
    assert {len(prompt(request)) for request in requests} == {20}  # (40 - 10) / 1.5
    assert len({tuple(prompt(request)[:4]) for request in requests}) == len(requests)
    assert {word for request in requests for word in prompt(request)} <= set(WORDS)


def test_a_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    requests = fixed(replace(WORKLOAD, shared_prefix_tokens=15))
    assert len({tuple(prompt(request)[:10]) for request in requests}) == 1
    assert len({tuple(prompt(request)[10:]) for request in requests}) == len(requests)
    assert {len(prompt(request)) for request in requests} == {20}


def test_lengths_are_drawn_from_both_ranges() -> None:
    ranges = replace(WORKLOAD, prompt_tokens=TokenRange(40, 43), output_tokens=TokenRange(2, 4))
    requests = fixed(ranges)
    assert {request.wanted_tokens for request in requests} == {2, 3, 4}
    assert {len(prompt(request)) for request in requests} == {20, 21, 22}
    for request in requests:
        assert json.loads(request.body)["max_tokens"] == request.wanted_tokens


def test_the_body_holds_output_lengths() -> None:
    body = json.loads(next(WORKLOAD.requests()).body)
    assert body["ignore_eos"] is True
    assert body["stream"] is True
    assert body["stream_options"]["include_usage"] is True


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [pytest.param("512", 512, 512, id="one"), pytest.param("1-9", 1, 9, id="range")],
)
def test_token_range(text: str, low: int, high: int) -> None:
    assert TokenRange.parse(text) == TokenRange(low, high)


@pytest.mark.parametrize("text", ["", "0", "-3", "9-1", "x", "1-2-3"])
def test_not_a_token_range(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        TokenRange.parse(text)


@pytest.mark.parametrize(
    ("few", "many", "tokens", "words"),
    [
        pytest.param((10, 25), (100, 160), 160, 100, id="exact"),
        pytest.param((10, 25), (100, 160), 1, 1, id="at-least-one"),
        pytest.param((10, 0), (100, 0), 64, 64, id="no-usage"),
    ],
)
def test_prompt_scale(few: tuple[int, int], many: tuple[int, int], tokens: int, words: int) -> None:
    assert PromptScale.from_probes(few, many).words_for(tokens) == words
