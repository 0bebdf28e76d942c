"""How a token is drawn: effects checked against the log-probabilities the model reports."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.conformance import Api, Json, text_of

EOS = 2
WORD = "first"  # one token, and another one after a space
field = pytest.mark.field
INT64 = 2**63


def rows(answer: Json) -> list[tuple[int, dict[int, float]]]:
    """Each drawn token, with the log-probability of every token of the vocabulary there."""
    choice = answer["choices"][0]
    result = []
    for token, entry in zip(choice["token_ids"], choice["logprobs"]["content"], strict=True):
        scores = {
            int(one["token"].removeprefix("token_id:")): one["logprob"]
            for one in entry["top_logprobs"]
        }
        assert entry["token"] == f"token_id:{token}"
        result.append((token, scores))
    return result


def whole(api: Api, **fields: Any) -> list[tuple[int, dict[int, float]]]:
    answer = api.chat(
        logprobs=True,
        top_logprobs=-1,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
        **fields,
    )
    return rows(answer)


def best(
    scores: dict[int, float],
    before: Sequence[int],
    *,
    bias: dict[int, float] | None = None,
    frequency: float = 0.0,
    presence: float = 0.0,
    banned: Sequence[int] = (),
) -> int:
    """What greedy decoding must draw."""
    counts = Counter(before)

    def value(token: int) -> float:
        change = (bias or {}).get(token, 0.0)
        change -= frequency * counts[token] + presence * (token in counts)
        return scores[token] + change

    return max((token for token in scores if token not in banned), key=value)


# Temperature and truncation


@field("temperature")
def test_temperature(api: Api) -> None:
    greedy = [api.ids(temperature=0, seed=seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    assert all(token == best(scores, ()) for token, scores in whole(api, temperature=0))
    hot = api.ids(temperature=2.0, seed=1)
    warm = api.ids(temperature=0.5, seed=1)
    assert len({tuple(greedy[0]), tuple(hot), tuple(warm)}) == 3


@field("temperature")
def test_a_temperature_almost_zero_is_greedy(api: Api) -> None:
    assert api.ids(temperature=1e-6, top_p=0.5, seed=3) == api.ids(temperature=0)


@field("top_k")
def test_top_k(api: Api) -> None:
    assert api.ids(temperature=2.0, top_k=1, seed=1) == api.ids()
    drawn = whole(api, temperature=2.0, top_k=3, seed=1)
    assert all(token in sorted(s, key=s.__getitem__)[-3:] for token, s in drawn)
    off = [api.ids(temperature=2.0, top_k=k, seed=1) for k in (0, -1, 5000)]
    assert off[0] == off[1] == off[2] == api.ids(temperature=2.0, seed=1)


@field("top_p")
def test_top_p(api: Api) -> None:
    assert api.ids(temperature=1.0, top_p=1e-6, seed=1) == api.ids()
    free = api.ids(temperature=2.0, seed=1, max_tokens=16)
    assert api.ids(temperature=2.0, top_p=1.0, seed=1, max_tokens=16) == free
    assert api.ids(temperature=2.0, top_p=0.2, seed=1, max_tokens=16) != free


@field("min_p")
def test_min_p(api: Api) -> None:
    assert api.ids(temperature=1.0, min_p=1.0, seed=1) == api.ids()
    drawn = whole(api, temperature=1.0, min_p=0.5, seed=1)
    assert all(scores[token] >= max(scores.values()) - 0.6932 for token, scores in drawn)
    assert api.ids(temperature=1.0, min_p=0.0, seed=1) == api.ids(temperature=1.0, seed=1)


@field("seed")
def test_seed(api: Api) -> None:
    seeds = (0, 1, 1 << 40, INT64 - 1, -INT64, -2)
    drawn = [tuple(api.ids(temperature=1.5, seed=seed)) for seed in seeds]
    again = [tuple(api.ids(temperature=1.5, seed=seed)) for seed in seeds]
    assert drawn == again
    assert len(set(drawn)) == len(seeds)


@field("seed")
def test_without_a_seed_every_answer_is_another(api: Api) -> None:
    drawn = {tuple(api.ids(temperature=2.0, max_tokens=16)) for _ in range(2)}
    api.answers.clear()  # nothing to compare
    assert len(drawn) == 2


# Penalties and bias


@field("frequency_penalty", "presence_penalty")
@pytest.mark.parametrize(("frequency", "presence"), [(0.7, 0.0), (0.0, 1.3), (2.0, 2.0), (-2, -2)])
def test_penalties_count_the_output_only(api: Api, frequency: float, presence: float) -> None:
    fields = {"allowed_token_ids": [300, 301, 302, 303], "max_tokens": 12}
    drawn = whole(api, frequency_penalty=frequency, presence_penalty=presence, **fields)
    before: list[int] = []
    others = [token for token in drawn[0][1] if token not in fields["allowed_token_ids"]]  # type: ignore[operator]
    for token, scores in drawn:
        assert token == best(scores, before, frequency=frequency, presence=presence, banned=others)
        before.append(token)
    assert before != api.ids(**fields) or frequency < 0


@field("repetition_penalty")
def test_repetition_penalty_counts_prompt_and_output(api: Api) -> None:
    prompt = set(api.prompt_ids())
    shy = api.ids(max_tokens=24, repetition_penalty=1e3)
    assert len(set(shy)) == 24
    assert not prompt & set(shy)
    fond = api.ids(max_tokens=24, repetition_penalty=1e-3)  # from the first token on
    assert set(fond) <= prompt
    # The bias comes first, so a penalty divides it as well.
    biased = {"logit_bias": {"500": 100}}
    assert api.ids(**biased) == [500] * 8
    assert api.ids(repetition_penalty=1e3, **biased).count(500) == 1


@field("logit_bias")
def test_logit_bias(api: Api) -> None:
    first, second = (token for token, _ in whole(api, max_tokens=2))
    banned = whole(api, logit_bias={str(first): -100})
    assert all(token == best(s, (), bias={first: -100.0}) for token, s in banned)
    assert first not in [token for token, _ in banned]
    assert api.ids(logit_bias={str(second): 100}) == [second] * 8
    assert api.ids(logit_bias={str(second): 1e9}) == [second] * 8  # clamped, not refused
    assert api.ids(logit_bias={}) == api.ids()


@field("logit_bias", "response.choices.logprobs")
def test_reported_log_probabilities_are_the_models_own(api: Api) -> None:
    plain = whole(api, max_tokens=1)[0][1]
    changed = whole(
        api,
        max_tokens=1,
        temperature=0.3,
        seed=1,
        logit_bias={"500": 100},
        bad_words=["sea"],
        presence_penalty=2,
    )[0]
    assert changed[0] == 500
    assert changed[1] == pytest.approx(plain, abs=1e-4)


@field("allowed_token_ids")
def test_allowed_token_ids(api: Api) -> None:
    allowed = [400, 401, 402]
    drawn = whole(api, allowed_token_ids=allowed, temperature=1.0, seed=2)
    assert {token for token, _ in drawn} <= set(allowed)
    greedy = whole(api, allowed_token_ids=allowed)
    assert all(token == max(allowed, key=scores.__getitem__) for token, scores in greedy)


@field("bad_words")
def test_bad_words_are_masked_bare_and_after_a_space(api: Api) -> None:
    bare, spaced = api.encode(WORD), api.encode(" " + WORD)
    assert (len(bare), len(spaced)) == (1, 1)
    for token in (bare[0], spaced[0]):
        wanted = {"logit_bias": {str(token): 100}}
        assert api.ids(**wanted) == [token] * 8
        assert token not in api.ids(bad_words=[WORD], **wanted)
    assert api.ids(bad_words=["zzz qqq"]) == api.ids()


@field("bad_words")
def test_a_bad_word_of_several_tokens(api: Api) -> None:
    """Its last token is masked only after the others, the first from P and the next from D."""
    (token,) = api.encode(" " + WORD)
    wanted = {"logit_bias": {str(token): 100}, "bad_words": [f"{WORD} {WORD}"]}
    is_word = [one == token for one in api.ids(**wanted)]
    assert is_word == [True, False] * 4


@field("bad_words", "allowed_token_ids", "logit_bias", "frequency_penalty", "min_tokens")
def test_all_rules_together(api: Api) -> None:
    """Every token, the one from P included, is what the rules in their order give."""
    allowed = [EOS, *range(300, 420)]
    bias = {310: 3.0, 350: -4.0, EOS: 5.0}
    drawn = whole(
        api,
        allowed_token_ids=allowed,
        logit_bias={str(key): value for key, value in bias.items()},
        frequency_penalty=1.1,
        presence_penalty=0.4,
        min_tokens=9,
        max_tokens=10,
    )
    outside = [token for token in drawn[0][1] if token not in allowed]
    before: list[int] = []
    for token, scores in drawn:
        banned = [*outside, EOS] if len(before) < 9 else outside
        want = best(scores, before, bias=bias, frequency=1.1, presence=0.4, banned=banned)
        assert token == want, len(before)
        before.append(token)
    assert len(before) == 10


# Several answers


@field("n", "response.choices.index")
def test_n_samples_use_following_seeds(api: Api) -> None:
    answer = api.chat(n=3, temperature=1.2, seed=40, return_token_ids=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    alone = [api.ids(temperature=1.2, seed=40 + index) for index in range(3)]
    assert [choice["token_ids"] for choice in answer["choices"]] == alone
    assert len({text_of(answer, index) for index in range(3)}) == 3
    single = api.chat(temperature=1.2, seed=40)
    assert answer["usage"]["prompt_tokens"] == single["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 24


def extend(api: Api, prompt: list[int], count: int) -> list[tuple[int, float]]:
    """The best next tokens after a prompt of ids."""
    answer = api.post(
        "/v1/completions",
        {
            "model": api.model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": count,
            "return_tokens_as_token_ids": True,
        },
    )
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    ranked = sorted(top.items(), key=lambda item: -item[1])[:count]
    return [(int(token.removeprefix("token_id:")), value) for token, value in ranked]


@field("use_beam_search")
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_beam_search(api: Api, steps: int) -> None:
    """Beams as a client would find them, one token at a time."""
    width = 2
    answer = api.chat(use_beam_search=True, n=width, max_tokens=steps, return_token_ids=True)
    prompt = answer["prompt_token_ids"]
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(steps):
        found = [
            ([*ids, token], total + value)
            for ids, total in beams
            for token, value in extend(api, prompt + ids, 2 * width)
        ]
        beams = sorted(found, key=lambda beam: -beam[1])[:width]
    assert [choice["token_ids"] for choice in answer["choices"]] == [ids for ids, _ in beams]
    assert answer["usage"]["completion_tokens"] == width * steps
    assert answer["usage"]["prompt_tokens"] == len(prompt)


@field("use_beam_search")
def test_nothing_but_the_model_steers_beams(api: Api) -> None:
    fields = {"use_beam_search": True, "n": 3, "max_tokens": 4}
    plain = api.chat(**fields)
    hot = api.chat(**fields, **{"temperature": 1.7, "seed": 3, "top_p": 0.5})
    assert [text_of(plain, i) for i in range(3)] == [text_of(hot, i) for i in range(3)]
