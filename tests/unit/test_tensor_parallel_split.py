"""How a model is cut, and that a cut that computes something else is found. Ranks are threads."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from contracts.errors import ConfigurationError, EngineFailure
from engine.rank_group import RankGroup
from engine.tensor_parallel import check_split, rank_device, split, whole_logits
from tests.support.tiny_models import build_tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def meet() -> None:
    """Threads need not wait for each other's weights."""


def on_ranks(folder: Path, size: int, job: Callable[[RankGroup], Any]) -> list[Any]:
    """What the job gives, or raises, on each of `size` ranks."""

    def run(rank: int) -> Any:
        torch.set_num_threads(1)
        group = RankGroup(rank, size, folder, meet)
        try:
            return job(group)
        except Exception as error:
            return error
        finally:
            group.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def checked(model: Path, damage: Callable[[Any], None], dtype: torch.dtype) -> Any:
    """A job: split a model, damage it on rank 1, check it."""
    modules = [load(model, dtype) for _ in range(2)]  # not in threads: transformers minds

    def job(group: RankGroup) -> None:
        module = modules[group.rank]
        whole = whole_logits(module) if group.rank == 0 else None
        split(module, group)
        if group.rank == 1:
            damage(module)
        group.connect(CPU)
        check_split(module, whole, group)

    return job


def nothing(module: Any) -> None:
    pass


def zero(name: str) -> Callable[[Any], None]:
    def damage(module: Any) -> None:
        module.get_parameter(name).zero_()

    return damage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_split_passes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_tiny("qwen3_moe", tmp_path / "model")
    (tmp_path / "meet").mkdir()
    assert on_ranks(tmp_path / "meet", 2, checked(model, nothing, dtype)) == [None, None]


@pytest.mark.parametrize(
    "damage",
    [
        zero("model.layers.1.self_attn.o_proj.part.weight"),
        zero("model.layers.2.mlp.experts.down_proj"),
        zero("lm_head.part.weight"),
    ],
    ids=["attention", "experts", "head"],
)
def test_a_wrong_split_is_found_by_all_ranks(damage: Callable[[Any], None], tmp_path: Path) -> None:
    model = build_tiny("qwen3_moe", tmp_path / "model")
    (tmp_path / "meet").mkdir()
    for found in on_ranks(tmp_path / "meet", 2, checked(model, damage, torch.float32)):
        assert isinstance(found, ConfigurationError)
        assert "'qwen3_moe': split by its plan, its logits differ" in str(found)


def test_layers_are_slices_of_the_whole(tmp_path: Path) -> None:
    model = build_tiny("starcoder2", tmp_path / "model")
    whole = load(model)
    parts = [load(model) for _ in range(2)]
    for rank, part in enumerate(parts):
        split(part, RankGroup(rank, 2, tmp_path, meet))
    first, layers = whole.model.layers[0], [part.model.layers[0] for part in parts]
    for name in ("q_proj", "k_proj", "v_proj"):
        linears = [getattr(layer.self_attn, name) for layer in layers]
        assert all(type(linear) is nn.Linear for linear in linears), "packed like any other"
        joined = torch.cat([linear.weight for linear in linears])
        assert torch.equal(joined, getattr(first.self_attn, name).weight)
        joined = torch.cat([linear.bias for linear in linears])
        assert torch.equal(joined, getattr(first.self_attn, name).bias)
    joined = torch.cat([layer.self_attn.o_proj.weight for layer in layers], dim=1)
    assert torch.equal(joined, first.self_attn.o_proj.weight)
    assert all(
        torch.equal(layer.self_attn.o_proj.bias, first.self_attn.o_proj.bias) for layer in layers
    )
    assert torch.equal(torch.cat([part.lm_head.weight for part in parts]), whole.lm_head.weight)
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in parts]
    assert sizes[0] < 0.7 * sum(weight.numel() for weight in whole.parameters())


def test_a_head_that_does_not_divide_stays_whole(tmp_path: Path) -> None:
    model = build_tiny("llama", tmp_path / "model", vocab_size=385)
    (tmp_path / "meet").mkdir()
    assert on_ranks(tmp_path / "meet", 2, checked(model, nothing, torch.float32)) == [None, None]


def test_an_mlp_that_does_not_divide_is_refused_by_name(tmp_path: Path) -> None:
    module = load(build_tiny("llama", tmp_path / "model", intermediate_size=129))
    with pytest.raises(ConfigurationError, match=r"'llama': .*129 features does not divide by 2"):
        split(module, RankGroup(0, 2, tmp_path, meet))


def test_a_style_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    module = load(build_tiny("llama", tmp_path / "model"))
    module._tp_plan = {**module.tp_plan, "model.layers.*.mlp.up_proj": "sequence_parallel"}
    with pytest.raises(ConfigurationError, match=r"'llama': .*'sequence_parallel', which is not"):
        split(module, RankGroup(0, 2, tmp_path, meet))


def test_the_ranks_compute_together(tmp_path: Path) -> None:
    def job(group: RankGroup) -> Any:
        group.connect(CPU)
        mine = torch.arange(6.0).view(2, 3) + group.rank
        gathered = group.gather_last(mine.t().contiguous().t())
        most, nan = group.maximum(float(group.rank)), group.maximum(float("nan"))
        group.barrier()
        return gathered, group.all_reduce(mine.clone()), most, nan

    for gathered, added, most, nan in on_ranks(tmp_path, 3, job):
        whole = torch.arange(6.0).view(2, 3)
        assert torch.equal(gathered, torch.cat([whole, whole + 1, whole + 2], dim=1))
        assert torch.equal(added, 3 * whole + 3)
        assert most == 2.0
        assert nan != nan


@pytest.mark.parametrize("rows", [3, 300], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_the_same_to_the_bit_on_all_ranks(
    rows: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    parts = torch.randn((3, rows, 128), generator=torch.Generator().manual_seed(1)).to(dtype)

    def job(group: RankGroup) -> torch.Tensor:
        group.connect(CPU)
        return group.all_reduce(parts[group.rank].clone())

    found = on_ranks(tmp_path, 3, job)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0].float(), parts.float().sum(0), rtol=1e-2, atol=3e-2)


def test_nobody_waits_for_a_rank_that_has_gone(tmp_path: Path) -> None:
    def job(group: RankGroup) -> None:
        group.connect(CPU)
        if group.rank == 0:
            group.barrier()

    first, second = on_ranks(tmp_path, 2, job)
    assert isinstance(first, EngineFailure)
    assert second is None


def test_ranks_take_the_gpus_that_follow() -> None:
    assert rank_device(CPU, 3) == CPU
    assert rank_device(torch.device("cuda"), 3) == torch.device("cuda", 3)
    assert rank_device(torch.device("cuda", 2), 1) == torch.device("cuda", 3)
