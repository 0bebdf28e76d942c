"""The engine against transformers: the same greedy tokens for every architecture.

Sequences live in shuffled blocks; their prefills come in chunks that share steps with decodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig, T5Config

from contracts.errors import ConfigurationError, UnsupportedModel
from contracts.sampling import SamplingParams
from engine.attention.base import AttentionLayer
from engine.attention.cpu import SdpaBackend
from engine.attention.select import select_backend
from engine.kv_cache import KvCache
from engine.model import LoadedModel, load_model
from engine.packed import pack
from engine.plan import Chunk, SampleSlot, StepPlan
from engine.probe import probe
from engine.runner import ModelRunner
from engine.speed_up import use_native_decoder
from engine.weights import weights_digest
from tests.support.tiny_models import ARCHITECTURES, VOCAB, WINDOW, build_tiny

BLOCK = 16
PROMPT_LENGTHS = (1, 15, 16, 17, 31, 33, 100, 200)
NEW_TOKENS = 16
CHUNK = 45  # tokens of one prompt in a step, across block borders
EAGER_ONLY = {"gemma2", "gpt_oss"}  # transformers' SDPA knows neither soft caps nor sinks
SLOT = (SampleSlot(choice=0, position=0, params=SamplingParams(max_tokens=NEW_TOKENS)),)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a tiny model by architecture, built once."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda arch: build_tiny(arch, root / arch))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [
        torch.randint(VOCAB, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS
    ]


@dataclass
class Running:
    """One sequence driven by hand. `margins` are those of the drawn tokens' logits."""

    tokens: list[int]
    table: tuple[int, ...]
    prompt_len: int
    done: int = 0
    margins: list[float] = field(default_factory=list)

    @property
    def drawn(self) -> list[int]:
        return self.tokens[self.prompt_len :]


def greedy(runner: ModelRunner, all_prompts: list[list[int]]) -> list[Running]:
    """Greedy tokens of all prompts together."""
    order = torch.randperm(runner.cache.num_blocks, generator=torch.Generator().manual_seed(3))
    free = order.tolist()
    running = []
    for prompt in all_prompts:
        count = -(-(len(prompt) + NEW_TOKENS) // BLOCK)
        table, free = tuple(free[:count]), free[count:]
        running.append(Running(list(prompt), table, len(prompt)))
    for step in range(1000):
        active = [item for item in running if len(item.drawn) < NEW_TOKENS]
        if not active:
            return running
        chunks = []
        for item in active:
            new = tuple(item.tokens[item.done : item.done + CHUNK])
            slots = SLOT if item.done + len(new) == len(item.tokens) else ()
            chunks.append(Chunk(running.index(item), item.done, new, item.table, slots))
            item.done += len(new)
        logits = runner.forward(StepPlan(step, tuple(chunks)))
        drawing = [item for item, chunk in zip(active, chunks, strict=True) if chunk.slots]
        assert logits.shape == (len(drawing), runner.model.vocab_size)
        assert logits.dtype == torch.float32
        best, second = logits.topk(2).values.unbind(-1)
        for item, token, margin in zip(
            drawing, logits.argmax(-1).tolist(), (best - second).tolist(), strict=True
        ):
            item.tokens.append(token)
            item.margins.append(margin)
    raise AssertionError("did not end")


def reference(folder: Path, arch: str, prompt: list[int]) -> list[int]:
    """Greedy tokens by transformers alone."""
    model = stock(folder, "eager" if arch in EAGER_ONLY else "sdpa")
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
    )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


@cache
def stock(folder: Path, attention: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)


def runner_of(model: LoadedModel, backend: SdpaBackend | None = None) -> ModelRunner:
    kv = KvCache(model.kv_spec(BLOCK), 64, model.device)
    return ModelRunner(model, kv, backend or select_backend(model.device))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_equal_transformers(arch: str, models: Any) -> None:
    folder = models(arch)
    model = load_model(folder)
    pack(model.module)
    runner = runner_of(model)
    assert probe(runner) < 1e-4
    use_native_decoder(runner)
    running = greedy(runner, prompts())
    for item in running:
        prompt = item.tokens[: item.prompt_len]
        expected = reference(folder, arch, prompt)
        differing = [i for i in range(NEW_TOKENS) if item.drawn[i] != expected[i]]
        assert not differing, (
            f"{arch}, prompt of {len(prompt)}: token {differing[0]} is "
            f"{item.drawn[differing[0]]}, transformers has {expected[differing[0]]}; "
            f"logit margin {item.margins[differing[0]]:.2g}"
        )
    lively = [item for item in running if len(set(item.drawn)) > 2]
    assert len(lively) > len(running) // 2, "constant sequences would hide errors"
    assert len({tuple(item.drawn) for item in running}) == len(running)


def test_layers_are_what_the_configuration_says(models: Any) -> None:
    gemma = load_model(models("gemma2"))
    assert [layer.window for layer in gemma.layers] == [WINDOW, None, WINDOW]
    assert {layer.softcap for layer in gemma.layers} == {5.0}
    assert {layer.scaling for layer in gemma.layers} == {24**-0.5}
    assert all(layer.has_sinks for layer in load_model(models("gpt_oss")).layers)
    llama = load_model(models("llama"), max_model_len=100)
    assert (llama.num_layers, llama.num_kv_heads, llama.head_dim) == (3, 2, 16)
    assert (llama.vocab_size, llama.max_model_len, llama.eos_token_ids) == (VOCAB, 100, ())
    assert load_model(models("llama"), max_model_len=5000).max_model_len == 1024


def test_end_tokens_come_from_the_generation_config(models: Any, tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "ending")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_model(folder).eos_token_ids == (7, 9)


def test_copies_come_before_the_forward(models: Any) -> None:
    runner = runner_of(load_model(models("llama")))
    prompt = tuple(prompts()[4])
    whole = runner.forward(StepPlan(0, (Chunk(0, 0, prompt, (5, 9), SLOT),)))
    fork = Chunk(1, len(prompt) - 1, prompt[-1:], (5, 2), SLOT)
    again = runner.forward(StepPlan(1, (fork,), copies=((9, 2),)))
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)


def test_a_step_without_draws_gives_no_rows(models: Any) -> None:
    runner = runner_of(load_model(models("llama")))
    logits = runner.forward(StepPlan(0, (Chunk(0, 0, (1, 2, 3), (4,)),)))
    assert logits.shape == (0, VOCAB)
    assert runner.forward(StepPlan(1, (), copies=((4, 5),))).shape == (0, VOCAB)
    assert torch.equal(runner.cache.tensor[4], runner.cache.tensor[5])


def test_a_changed_block_table_is_noticed(models: Any) -> None:
    """A preempted sequence comes back under its id with other blocks."""
    runner = runner_of(load_model(models("llama")))
    prompt = tuple(prompts()[4])
    first = runner.forward(StepPlan(0, (Chunk(0, 0, prompt, (5, 9), SLOT),)))
    runner.cache.tensor[[5, 9]] = torch.nan
    second = runner.forward(StepPlan(1, (Chunk(0, 0, prompt, (8, 3), SLOT),)))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_probe_allows_for_half_precision(dtype: str, models: Any) -> None:
    for arch in ("llama", "gemma2", "gpt_oss", "qwen3_moe"):
        probe(runner_of(load_model(models(arch), dtype=dtype)))


class ForgetsTheFirstToken(SdpaBackend):
    """Wrong on purpose: later chunks and decodes do not see the sequence's first key."""

    def attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self._batch is not None
        assert self._cache is not None
        for table in self._batch.tables:
            self._cache.tensor[table[0], :, layer.index, :, 0] = 0
        return super().attend(layer, query, key, value, sinks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_probe_catches_a_wrong_backend(dtype: str, models: Any) -> None:
    model = load_model(models("llama"), dtype=dtype)
    with pytest.raises(UnsupportedModel, match=r"'llama' .* differ from its own"):
        probe(runner_of(model, ForgetsTheFirstToken()))


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 8])
def test_probe_fits_small_caches_and_leaves_them_clear(num_blocks: int, models: Any) -> None:
    model = load_model(models("llama"))
    kv = KvCache(model.kv_spec(BLOCK), num_blocks, model.device)
    assert probe(ModelRunner(model, kv, select_backend(model.device))) < 1e-4
    assert not kv.tensor.any()


def test_the_weights_digest_tells_weights_apart(models: Any, tmp_path: Path) -> None:
    model = load_model(models("llama"))
    assert model.weights_digest() == load_model(models("llama")).weights_digest()
    assert model.weights_digest() != load_model(models("qwen2")).weights_digest()
    changed = build_tiny("llama", tmp_path / "changed")
    assert load_model(changed).weights_digest() == model.weights_digest()  # seeded, so equal
    weights = changed / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert load_model(changed).weights_digest() != model.weights_digest()


def test_big_weights_are_told_apart_by_samples_of_each_tensor(tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "big")
    before = weights_digest(folder, whole_bytes=0)
    assert before == weights_digest(folder, whole_bytes=0)
    assert before != weights_digest(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the last tensor's last byte
    weights.write_bytes(content)
    assert before != weights_digest(folder, whole_bytes=0)


def longrope(original: int) -> dict[str, Any]:
    factors = [1.0] * 8
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": original,
        },
        "original_max_position_embeddings": original,
    }


def test_longrope_is_served_up_to_its_original_length(tmp_path: Path) -> None:
    folder = build_tiny("phi3", tmp_path / "phi3", **longrope(256))
    with pytest.raises(UnsupportedModel, match="--max-model-len 256 works"):
        load_model(folder)
    assert load_model(folder, max_model_len=256).max_model_len == 256


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
CHUNKED = ["chunked_attention", "full_attention", "full_attention"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        pytest.param(MambaConfig(), "'mamba'", id="mamba"),
        pytest.param(T5Config(), "'t5' .* encoder-decoder", id="t5"),
        pytest.param(
            AutoConfig.for_model("llama", rope_parameters=DYNAMIC),
            "'llama' .* dynamic rope",
            id="dynamic-rope",
        ),
        pytest.param(
            AutoConfig.for_model("smollm3", num_hidden_layers=3, layer_types=CHUNKED),
            "'smollm3' .* chunked_attention",
            id="chunked",
        ),
        pytest.param(AutoConfig.for_model("deepseek_v3"), r"'deepseek_v3' .*\(MLA\)", id="mla"),
        pytest.param(AutoConfig.for_model("bloom"), "'bloom' .* ALiBi", id="alibi"),
        pytest.param(AutoConfig.for_model("falcon", alibi=True), "'falcon' .* ALiBi", id="falcon"),
        pytest.param(AutoConfig.for_model("jamba"), "'jamba'", id="jamba"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(config: Any, reason: str, tmp_path: Path) -> None:
    """No weights are there, so the refusal comes before any are read."""
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason):
        load_model(tmp_path)


def test_bidirectional_attention_is_refused_by_name(tmp_path: Path) -> None:
    """Its configuration does not tell; the traced token does."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("bert", vocab_size=50, intermediate_size=32, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"'bert' .* bidirectional"):
        load_model(tmp_path)


def test_no_model_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no usable model"):
        load_model(tmp_path)
    build_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="no usable weights"):
        load_model(tmp_path)
    with pytest.raises(ConfigurationError, match="dtype 'int8'"):
        load_model(tmp_path, dtype="int8")
