"""Decode steps in one native call: what the model's own modules compute, alone and in a crowd."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contracts.sampling import SamplingParams
from engine import speed_up
from engine.attention.native_build import native_library
from engine.attention.select import select_backend
from engine.kv_cache import KvCache
from engine.model import load_model
from engine.native_decoder import MAX_BATCH, NativeDecoder, NotThisKind
from engine.packed import PackedLinear, pack
from engine.plan import Chunk, SampleSlot, StepPlan
from engine.runner import ModelRunner
from engine.speed_up import use_native_decoder
from tests.support.tiny_models import VOCAB, build_tiny

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")

BLOCK = 16
SLOT = (SampleSlot(choice=0, position=0, params=SamplingParams(max_tokens=1)),)
KINDS = ("llama", "mistral", "qwen2", "qwen3")
SPREAD = {"float32": 2e-5, "bfloat16": 3e-2}


@pytest.fixture(autouse=True, scope="module", params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def runner_of(folder: Path, arch: str, dtype: str = "float32", **changes: Any) -> ModelRunner:
    name = "-".join([arch, *(f"{key}{value}" for key, value in changes.items())])
    model = load_model(build_tiny(arch, folder / name, **changes), dtype=dtype)
    pack(model.module)
    kv = KvCache(model.kv_spec(BLOCK), 400, model.device)
    return ModelRunner(model, kv, select_backend(model.device))


class Sequences:
    """Prompts of several lengths in shuffled blocks; unused rows of the cache are NaN."""

    def __init__(self, runner: ModelRunner, lengths: list[int]) -> None:
        random = np.random.default_rng(3)
        self.runner, self.lengths = runner, lengths
        runner.cache.tensor.fill_(torch.nan)
        blocks = random.permutation(runner.cache.num_blocks).tolist()
        self.tables = []
        for length in lengths:
            needed = -(-(length + 1) // BLOCK)
            self.tables.append(tuple(blocks[:needed]))
            del blocks[:needed]
        self.tokens = [random.integers(0, VOCAB, length + 1).tolist() for length in lengths]
        decoder, runner.decoder = runner.decoder, None
        for row, length in enumerate(lengths):
            prompt = tuple(self.tokens[row][:length])
            runner.forward(StepPlan(0, (Chunk(row, 0, prompt, self.tables[row]),)))
        runner.decoder = decoder

    def step(self, rows: list[int]) -> torch.Tensor:
        """Logits after the last token of these sequences."""
        chunks = [
            Chunk(row, self.lengths[row], (self.tokens[row][-1],), self.tables[row], SLOT)
            for row in rows
        ]
        return self.runner.forward(StepPlan(0, tuple(chunks)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", KINDS)
def test_it_computes_what_the_modules_compute(arch: str, dtype: str, folder: Path) -> None:
    runner = runner_of(folder, arch, dtype)
    sequences = Sequences(runner, [1, 15, 16, 17, 63, 64, 65, 130, 200, 3, 90])
    batches = [list(range(11)), [7], [0, 8], [2, 3, 4, 5, 6, 9]]
    expected = [sequences.step(rows) for rows in batches]
    use_native_decoder(Sequences(runner, []).runner)
    assert runner.decoder is not None
    sequences = Sequences(runner, sequences.lengths)
    for rows, modules in zip(batches, expected, strict=True):
        found = sequences.step(rows)
        assert found.shape == (len(rows), VOCAB)
        error = (found - modules).square().mean(dim=1).sqrt() / modules.std(dim=1)
        assert float(error.max()) < SPREAD[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequences_logits_are_the_same_alone_and_in_a_crowd(dtype: str, folder: Path) -> None:
    runner = runner_of(folder, "qwen3", dtype)
    use_native_decoder(runner)
    sequences = Sequences(runner, [1 + 7 * i % 100 for i in range(19)])
    crowd = sequences.step(list(range(19)))
    for row in range(19):
        assert torch.equal(sequences.step([row])[0], crowd[row])


def test_the_largest_batch_and_one_more(folder: Path) -> None:
    runner = runner_of(folder, "llama")
    sequences = Sequences(runner, [5 + i % 3 for i in range(MAX_BATCH + 1)])
    modules = sequences.step(list(range(MAX_BATCH + 1)))
    use_native_decoder(runner)
    sequences = Sequences(runner, sequences.lengths)
    for count in (MAX_BATCH, MAX_BATCH + 1):
        found = sequences.step(list(range(count)))
        torch.testing.assert_close(found, modules[:count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        ("gemma2", {}, "none of the known kinds"),
        ("llama", {"hidden_act": "gelu"}, "activation"),
        ("llama", {"intermediate_size": 136}, "multiples of 32"),
    ],
)
def test_it_says_what_it_cannot_compute(
    arch: str, changes: dict[str, Any], reason: str, folder: Path
) -> None:
    runner = runner_of(folder, arch, **changes)
    with pytest.raises(NotThisKind, match=reason):
        NativeDecoder(runner.model, runner.cache, 1)
    use_native_decoder(runner)
    assert runner.decoder is None


def test_layers_that_are_not_packed_are_left_to_torch(folder: Path) -> None:
    model = load_model(build_tiny("llama", folder / "llama"))
    cache = KvCache(model.kv_spec(BLOCK), 8, model.device)
    with pytest.raises(NotThisKind, match="norm"):
        NativeDecoder(model, cache, 1)


def test_one_that_computes_something_else_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = runner_of(folder, "llama")
    layer = runner.model.module.model.layers[1].mlp.up_proj
    assert isinstance(layer, PackedLinear)
    other = torch.randn(layer.out_features, layer.in_features)
    right, layer.packed = layer.packed, torch.ops.mkldnn._reorder_linear_weight(other, 16)
    wrong = NativeDecoder(runner.model, runner.cache, 1)
    layer.packed = right
    monkeypatch.setattr(speed_up, "NativeDecoder", lambda *_: wrong)
    use_native_decoder(runner)
    assert runner.decoder is None
    assert "natively their logits would differ" in caplog.text
    assert not runner.cache.tensor.any()
