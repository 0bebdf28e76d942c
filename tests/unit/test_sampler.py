"""Draws follow the probabilities, keep to the filters, and depend on nothing but their key."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from contracts.sampling import SamplingParams
from engine.noise import draw_key, gumbel
from engine.plan import Sampled, SampleSlot
from engine.sampler import prompt_scores
from engine.sampler import sample as sample_with
from engine.sampling_state import SamplingStates


def slot(position: int = 0, choice: int = 0, **params: Any) -> SampleSlot:
    return SampleSlot(choice, position, SamplingParams(max_tokens=9, **params))


def sample(logits: torch.Tensor, rows: list[int], slots: list[SampleSlot]) -> list[Sampled]:
    return sample_with(logits, rows, slots, SamplingStates())


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


def test_min_p_drops_what_is_far_below_the_best() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]]))
    assert set(draws(logits, 2000, min_p=0.3)) == {1, 2, 3}  # at least 0.12
    assert set(draws(logits, 2000, min_p=1.0)) == {1}
    assert set(draws(logits, 3000, min_p=0.0)) == {0, 1, 2, 3, 4}
    assert set(draws(logits, 2000, min_p=0.3, top_k=2)) == {1, 3}
    # After temperature: 0.4 becomes 0.49, 0.25 becomes 0.19 of the squares' sum.
    assert set(draws(logits, 2000, min_p=0.3, temperature=0.5)) == {1, 3}


def test_ties_among_the_best_go_by_id() -> None:
    logits = torch.zeros((1, 400))
    logits[0, 390] = 1.0
    found = sample(logits, [0], [slot(temperature=0.0, logprobs=5)])[0].logprob
    assert found is not None
    assert [token for token, _ in found.top] == [390, 0, 1, 2, 3]
    logits = torch.randint(0, 4, (6, 1000)).float()
    for row in range(6):
        found = sample(logits, [row], [slot(temperature=0.0, logprobs=40)])[0].logprob
        assert found is not None
        order = torch.sort(logits[row], descending=True, stable=True).indices[:40]
        assert [token for token, _ in found.top] == order.tolist()


def test_a_beam_gets_the_candidates_of_the_models_own_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, 2.0, 0.0, -1.0, 3.0]])
    params: dict[str, Any] = {"temperature": 0.7, "top_k": 1, "logit_bias": ((0, 50.0),)}
    found = sample(logits, [0], [slot(beam=True, n=2, **params)])[0]
    assert found.token_id == 6
    assert found.logprob is not None
    assert [token for token, _ in found.logprob.top] == [6, 1, 3, 0]
    truth = torch.log_softmax(logits[0], dim=-1)
    assert found.logprob.top[2][1] == pytest.approx(float(truth[3]))
    wider = sample(logits, [0], [slot(beam=True, n=2, logprobs=6)])[0].logprob
    assert wider is not None
    assert len(wider.top) == 6
    whole = sample(logits, [0], [slot(beam=True, n=9)])[0].logprob
    assert whole is not None
    assert len(whole.top) == 7


@pytest.mark.parametrize("k", [0, 3, 1000])
def test_prompt_scores(k: int) -> None:
    torch.manual_seed(3)
    logits = torch.randn((5, 300))
    logits[0, 7] = logits[0, 9] = 6.0
    ids = (9, 0, 299, 5, 5)
    entries = prompt_scores(logits, ids, k)
    truth = torch.log_softmax(logits, dim=-1)
    for row, (entry, token) in enumerate(zip(entries, ids, strict=True)):
        assert entry.logprob == pytest.approx(float(truth[row, token]))
        assert entry.rank == 1 + int((truth[row] > truth[row, token]).sum())
        order = torch.sort(truth[row], descending=True, stable=True).indices[:k].tolist()
        assert [one for one, _ in entry.top] == order
    assert entries[0].rank == 1, "as good as the best"


def test_prompt_scores_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn((7, 64), generator=torch.Generator().manual_seed(1))
    whole = prompt_scores(logits, tuple(range(7)), 2)
    monkeypatch.setattr("engine.sampler.PIECE", 130)
    assert prompt_scores(logits, tuple(range(7)), 2) == whole
