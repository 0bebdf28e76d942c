"""Draws follow the probabilities, keep to the filters, and depend on nothing but their key."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from contracts.sampling import SamplingParams
from engine.noise import draw_key, gumbel
from engine.plan import SampleSlot
from engine.sampler import sample


def slot(position: int = 0, choice: int = 0, **params: Any) -> SampleSlot:
    return SampleSlot(choice, position, SamplingParams(max_tokens=9, **params))


def draws(logits: torch.Tensor, count: int, **params: Any) -> Counter[int]:
    """Tokens of `count` positions drawn from the same row."""
    slots = [slot(position, **params) for position in range(count)]
    return Counter(s.token_id for s in sample(logits, [0] * count, slots))


def test_greedy_takes_the_best_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 5.0, 5.0, 5.0]])
    found = sample(logits, [0, 1], [slot(temperature=0.0), slot(temperature=0.0)])
    assert [s.token_id for s in found] == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([[0.1, 1.2, -0.7, 2.0, 0.0]])
    count = 20_000
    found = draws(logits, count, temperature=temperature, seed=11)
    expected = torch.softmax(logits[0] / temperature, dim=-1)
    for token, probability in enumerate(expected.tolist()):
        spread = 4.5 * math.sqrt(probability * (1 - probability) / count)
        assert found[token] / count == pytest.approx(probability, abs=spread)


def test_top_k_and_top_p_keep_what_they_should() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]]))
    assert set(draws(logits, 2000, top_k=2)) == {1, 3}
    assert set(draws(logits, 2000, top_p=0.5)) == {1, 3}  # 0.4 < 0.5 <= 0.65
    assert set(draws(logits, 2000, top_p=0.39)) == {1}
    assert set(draws(logits, 3000, top_p=1.0, top_k=5)) == {0, 1, 2, 3, 4}
    assert set(draws(logits, 2000, top_k=3, top_p=0.7)) == {1, 3}  # top-p counts in the top-k


def test_ties_at_the_edge_of_a_filter_go_by_id() -> None:
    assert set(draws(torch.zeros((1, 6)), 500, top_k=3)) == {0, 1, 2}


def test_filtered_and_plain_draws_agree_where_the_filter_keeps_the_winner() -> None:
    torch.manual_seed(0)
    logits = torch.randn((1, 300)) * 3
    for position in range(200):
        plain = sample(logits, [0], [slot(position, seed=5)])[0].token_id
        filtered = sample(logits, [0], [slot(position, seed=5, top_k=200)])[0].token_id
        if plain in torch.topk(logits[0], 200).indices.tolist():
            assert filtered == plain


def test_a_draw_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(1)
    logits = torch.randn((4, 500))
    kinds = [
        slot(3, seed=2**64 - 1, choice=2),
        slot(0, temperature=0.0),
        slot(9, seed=4, top_p=0.7),
        slot(1, seed=4, top_k=3, temperature=0.3),
    ]
    together = [s.token_id for s in sample(logits, [0, 1, 2, 3], kinds)]
    alone = [sample(logits, [row], [kinds[row]])[0].token_id for row in range(4)]
    assert together == alone


def test_choices_of_one_row_have_their_own_streams() -> None:
    logits = torch.zeros((1, 1000))
    found = sample(logits, [0] * 4, [slot(choice=i, seed=2**64 - 2) for i in range(4)])
    assert len({s.token_id for s in found}) == 4
    # Choice i of seed s is choice 0 of seed s + i, modulo 2**64.
    assert draw_key(2**64 - 2, 3, 7) == draw_key(1, 0, 7)


def test_noise_is_exponential_and_never_wins_by_rounding() -> None:
    ids = torch.arange(400_000)[None, :]
    noise = gumbel(ids, [draw_key(123, 0, 4)])[0]
    exponential = torch.exp(-noise)
    assert float(exponential.mean()) == pytest.approx(1.0, abs=0.01)
    assert float((exponential < 0.1).float().mean()) == pytest.approx(1 - math.exp(-0.1), abs=0.002)
    assert float((exponential > 2.0).float().mean()) == pytest.approx(math.exp(-2.0), abs=0.002)
    assert float(exponential.min()) > 0.0, "E = 0 would let a random token win"
    other = gumbel(ids, [draw_key(123, 0, 5)])[0]
    correlation = torch.corrcoef(torch.stack([noise, other]))[0, 1]
    assert abs(float(correlation)) < 0.01


def test_logprobs_are_of_the_models_own_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, 2.0]])
    found = sample(logits, [0], [slot(temperature=0.2, top_k=1, logprobs=3)])[0]
    truth = torch.log_softmax(logits[0], dim=-1)
    assert found.logprob is not None
    assert found.logprob.logprob == pytest.approx(float(truth[found.token_id]))
    assert [token for token, _ in found.logprob.top] == [1, 3, 0]
    assert sample(logits, [0], [slot(temperature=0.0)])[0].logprob is None
    zero = sample(logits, [0], [slot(temperature=0.0, logprobs=0)])[0].logprob
    assert zero is not None
    assert zero.top == ()
