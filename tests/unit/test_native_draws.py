"""The native draws are those of torch, whatever the filters, the rows and the crowd."""

import ctypes
import random
from typing import Any

import pytest
import torch

from contracts.sampling import SamplingParams
from engine import native_draws, sampler
from engine.attention.native_build import native_library
from engine.noise import LEAST, draw_key, gumbel
from engine.plan import SampleSlot

FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 1},
    {"top_k": 3},
    {"top_k": 50, "top_p": 0.9},
    {"top_p": 0.0001},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 0.3, "top_p": 0.8},
    {"min_p": 0.01, "top_k": 40, "top_p": 0.95, "temperature": 0.7},
)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = native_library()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def slots(count: int, draws: random.Random, **params: Any) -> list[SampleSlot]:
    return [
        SampleSlot(
            draws.randrange(3),
            draws.randrange(5000),
            SamplingParams(9, seed=draws.getrandbits(64), **params),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("params", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 64, 1000, 20_001])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_draws_are_those_of_torch(
    library: ctypes.CDLL, vocab: int, spread: float, params: dict[str, Any]
) -> None:
    draws = random.Random(f"{vocab} {spread} {params}")
    logits = torch.randn(
        24, vocab, generator=torch.Generator().manual_seed(draws.getrandbits(32))
    ).mul_(spread)
    wanted = slots(24, draws, **params)
    assert native_draws.draw(library, logits, range(24), wanted) == sampler.draw(logits, wanted)


def test_rows_with_equal_values_and_without_most_tokens(library: ctypes.CDLL) -> None:
    draws = random.Random(5)
    logits = torch.full((40, 3000), float("-inf"))
    logits[:, 17::500] = 1.5
    for params in FILTERS:
        wanted = slots(40, draws, **params)
        found = native_draws.draw(library, logits, range(40), wanted)
        assert found == sampler.draw(logits, wanted)
        assert {token % 500 for token in found} == {17}
    alone = torch.full((1, 300), float("-inf"))
    alone[0, 299] = -50.0
    assert native_draws.draw(library, alone, [0] * 40, slots(40, draws)) == [299] * 40


def test_nobody_else_changes_a_draw(library: ctypes.CDLL) -> None:
    """Rows of a wider tensor, slots in any order, several threads."""
    draws = random.Random(6)
    logits = torch.randn(12, 70_000)[:, :65_000]
    wanted = [slot for params in FILTERS for slot in slots(3, draws, **params)]
    rows = [draws.randrange(12) for _ in wanted]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = native_draws.draw(library, logits, rows, wanted)
        torch.set_num_threads(1)
        alone = [
            native_draws.draw(library, logits, [row], [slot])[0]
            for row, slot in zip(rows, wanted, strict=True)
        ]
    finally:
        torch.set_num_threads(threads)
    assert together == alone


def test_the_one_whose_noise_is_infinite_in_float32_still_wins_alone() -> None:
    """Of hash 2**32 - 1; torch's noise has the same floor."""
    draws = random.Random(7)
    keys = [draw_key(draws.getrandbits(64), 0, 0) for _ in range(40)]
    noise = gumbel(torch.arange(1_000_000)[None, :], keys)
    assert noise.min().item() == LEAST
    assert torch.isfinite(noise).all()
