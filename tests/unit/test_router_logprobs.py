import json

import pytest

from contracts.errors import EngineFailure
from contracts.events import PromptLogprob, PromptScores
from contracts.ids import RequestId
from router.job import Usage
from router.logprobs import PromptEntry, prompt_entries, prompt_logprobs_json
from router.responses import Answer, AnswerHead
from router.scores import ScoreSheet
from tests.support.chat_answer import EOS, VOCABULARY, ids


def test_tokens_are_named_in_their_place() -> None:
    euro = ids("€")
    tokens = [*ids("a"), *euro, EOS]
    other = ids("b")[0]
    scores = [None, *(PromptLogprob(-1.0, 2, ((other, -0.5),)) for _ in tokens[1:])]
    entries = prompt_entries(VOCABULARY, tokens, scores, 1)
    assert [entry.token for entry in entries] == ["a", "", "", "€", "<|im_end|>"]
    assert entries[0] == PromptEntry(tokens[0], "a")
    assert entries[1].top == ((other, "b", -0.5),)


def test_the_best_and_the_actual_token_by_id() -> None:
    a, b = ids("a")[0], ids("b")[0]
    scores = [
        None,
        PromptLogprob(-float("inf"), 9, ((b, -0.1), (EOS, -3.0))),
        PromptLogprob(-0.2, 3, ((b, -0.2), (a, -4.0))),  # what was counted holds, not the place
    ]
    found = prompt_logprobs_json(prompt_entries(VOCABULARY, [a, a, b], scores, 2))
    assert found == [
        None,
        {
            str(a): {"logprob": -9999.0, "rank": 9, "decoded_token": "a"},
            str(b): {"logprob": -0.1, "rank": 1, "decoded_token": "b"},
            str(EOS): {"logprob": -3.0, "rank": 2, "decoded_token": "<|im_end|>"},
        },
        {
            str(b): {"logprob": -0.2, "rank": 3, "decoded_token": "b"},
            str(a): {"logprob": -4.0, "rank": 2, "decoded_token": "a"},
        },
    ]


@pytest.mark.parametrize(("wanted", "shown"), [(0, 1), (1, 2), (-1, 4)])
def test_as_many_alternatives_as_wanted(wanted: int, shown: int) -> None:
    a, b = ids("a")[0], ids("b")[0]
    scores = [None, PromptLogprob(-5.0, 9, ((b, -0.1), (EOS, -3.0), (ids("c")[0], -4.0)))]
    found = prompt_logprobs_json(prompt_entries(VOCABULARY, [a, a], scores, wanted))
    assert found[1] is not None
    assert len(found[1]) == shown


@pytest.mark.parametrize("wanted", [True, False])
def test_the_body_has_them_if_the_client_wants_them(wanted: bool) -> None:
    head = AnswerHead("id", 1, "m", (5,), want_prompt_logprobs=wanted)
    body = Answer(head, 1).body(
        Usage(1, 0, 0), "hash", prompt=[PromptEntry(5, "a")], kv_transfer_params={"x": 1}
    )
    assert body["prompt_logprobs"] == ([None] if wanted else None)
    assert body["kv_transfer_params"] == {"x": 1}
    assert json.dumps(body)


# Gathering


def scores(position: int, count: int, logprob: float = -1.0) -> PromptScores:
    return PromptScores(RequestId("r"), 0, position, (PromptLogprob(logprob, 1),) * count)


def test_scores_are_complete_when_every_token_but_the_first_has_one() -> None:
    sheet = ScoreSheet(4, wanted=True)
    sheet.add(scores(2, 2))
    assert not sheet.complete
    assert sheet.entries is None
    sheet.add(scores(1, 2, -9.0))  # a repeat of position 2 is not looked at
    assert sheet.complete
    assert sheet.entries is not None
    values = [entry and entry.logprob for entry in sheet.entries]
    assert values == [None, -9.0, -1.0, -1.0]


def test_a_prompt_of_one_token_has_no_scores_to_wait_for() -> None:
    sheet = ScoreSheet(1, wanted=True)
    assert sheet.complete
    assert sheet.entries == (None,)


@pytest.mark.parametrize(("position", "count"), [(0, 1), (3, 2), (4, 1)])
def test_scores_beyond_the_prompt_are_a_failure(position: int, count: int) -> None:
    sheet = ScoreSheet(4, wanted=True)
    with pytest.raises(EngineFailure):
        sheet.add(scores(position, count))


def test_unwanted_scores_are_dropped() -> None:
    sheet = ScoreSheet(4, wanted=False)
    sheet.add(scores(1, 9))
    assert sheet.complete
    assert sheet.entries is None
