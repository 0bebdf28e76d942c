"""The soak's traffic and how it tells a right answer from a wrong one."""

import re
from collections import Counter
from typing import Any

import pytest

from tests.soak.answers import Wrong, assert_equal, events_of, streamed, whole
from tests.soak.mix import LEASE_S, Mix

Json = dict[str, Any]


def test_the_mix_has_everything_and_repeats() -> None:
    mix, again = Mix(5), Mix(5)
    plans = [mix.plan(index, room_s=LEASE_S + 1) for index in range(3000)]
    assert plans[:100] == [again.plan(index, room_s=LEASE_S + 1) for index in range(100)]
    assert plans[:100] != [Mix(6).plan(index, room_s=LEASE_S + 1) for index in range(100)]
    kinds = Counter(plan.kind for plan in plans)
    wanted = {"plain", "logprobs", "stop", "structured", "tools", "beams", "scores", "reference"}
    wanted |= {"mutated", "two-step adopt", "two-step abandon", "flood"}
    assert set(kinds) == wanted
    assert kinds["reference"] > 500
    ways = Counter(plan.leave.how if plan.leave else "stays" for plan in plans)
    assert 0.2 < 1 - ways["stays"] / len(plans) < 0.4
    assert min(ways[how] for how in ("soon", "events", "stalls")) > 10
    assert {plan.choices for plan in plans} >= {1, 2, 3, 4}
    assert {plan.path for plan in plans} == {"/v1/chat/completions", "/v1/completions"}
    assert {plan.stream for plan in plans} == {True, False}


def test_no_lease_is_left_to_run_out_in_a_pause() -> None:
    mix = Mix(5)
    plans = [mix.plan(index, room_s=LEASE_S - 1) for index in range(3000)]
    assert not [plan for plan in plans if plan.two_step == "abandon"]
    assert not [plan for plan in plans if plan.raw and b"do_remote_decode" in plan.raw]
    assert [plan for plan in plans if plan.two_step == "adopt"]


def test_a_question_that_cannot_be_learnt_is_not_asked() -> None:
    mix = Mix(5, num_references=3)
    mix.forget_reference(1)
    asked = {mix.plan(index, room_s=0).reference for index in range(500)}
    assert asked == {None, 0, 2}


def part(
    index: int = 0, text: str = "", ids: tuple[int, ...] = (), finish: str | None = None
) -> Json:
    return {
        "index": index,
        "delta": {"content": text},
        "token_ids": [*ids],
        "finish_reason": finish,
    }


def event(*parts: Json, **more: Any) -> Json:
    return {"choices": [*parts], **more}


FULL: Json = {
    "choices": [
        {"index": 0, "message": {"content": "ab"}, "token_ids": [1, 2], "finish_reason": "stop"}
    ],
    "usage": {"completion_tokens": 2},
}
STREAM = [event(part(text="a", ids=(1,))), event(part(text="b", ids=(2,), finish="stop"))]


def test_a_stream_and_a_full_answer_are_alike() -> None:
    assert_equal(streamed(STREAM, 1), whole(FULL, 1))


def test_calls_in_pieces_are_put_together() -> None:
    def piece(**function: str) -> Json:
        call = {"index": 0, "function": function}
        return {**part(ids=(3,)), "delta": {"tool_calls": [call]}}

    first, second = piece(name="f", arguments=""), piece(arguments='{"q":1}')
    found = streamed([event(first), event(second), event(part(finish="tool_calls"))], 1)
    assert found[0].calls == [["f", '{"q":1}']]


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        pytest.param([*STREAM, {"error": {"code": 500}}], "error-event", id="error"),
        pytest.param(STREAM[:1], "finish", id="no-end"),
        pytest.param([*STREAM, STREAM[0]], "stream", id="after-the-end"),
        pytest.param([event(part(index=1, finish="stop"))], "choices", id="another-choice"),
        pytest.param([*STREAM, event(usage={"completion_tokens": 3})], "usage", id="count"),
    ],
)
def test_a_wrong_stream_is_called_wrong(events: list[Json], kind: str) -> None:
    with pytest.raises(Wrong, match=f"^{kind}: "):
        streamed(events, 1)


def test_a_cut_stream_is_called_cut() -> None:
    assert events_of(["{}", "[DONE]"]) == ["{}"]
    for payloads in ([], ["{}"], ["[DONE]", "{}"]):
        with pytest.raises(Wrong, match=r"^cut: "):
            events_of(payloads)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"token_ids": [1, 3]}, "token_ids"),
        ({"message": {"content": "ac"}}, "text"),
        ({"finish_reason": "length"}, "finish"),
        ({"logprobs": {"content": [{"logprob": -1.0}]}}, "logprobs"),
    ],
)
def test_another_answer_is_called_different(change: Json, what: str) -> None:
    other = {**FULL, "choices": [{**FULL["choices"][0], **change}]}
    with pytest.raises(Wrong, match=re.escape(f"differs: {what} of choice 0")):
        assert_equal(whole(other, 1), whole(FULL, 1))
