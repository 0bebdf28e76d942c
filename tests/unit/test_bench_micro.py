"""The micro benchmarks' own arithmetic, and what their command line says no to."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import micro
from benchmarks.micro_clock import Effort, middle_half
from benchmarks.micro_machine import Machine
from benchmarks.micro_parts import StepParts
from benchmarks.micro_profile import group_of
from benchmarks.micro_weights import LinearShape, kv_bytes_per_token, read_weights
from benchmarks.split_pair import build_model
from cluster.cli import main as baton
from contracts.errors import ConfigurationError

MACHINE = Machine("cpu", "float32", 1, "2", 1 << 20, 10.0, 12.0, 64, matmul_gflop_s=100.0)


def test_the_matrices_of_a_model(tmp_path: Path) -> None:
    vocab_size = build_model(tmp_path)
    weights = read_weights(tmp_path)
    assert set(weights.shapes) == {
        LinearShape(256, 256, 4 * 5),
        LinearShape(128, 256, 4 * 2),
        LinearShape(vocab_size, 256, 1),
    }
    assert weights.layer_elements == 4 * (5 * 256 * 256 + 2 * 128 * 256)
    assert weights.head_elements == vocab_size * 256
    assert weights.flops(tokens=3, rows=1) == 2 * (
        3 * weights.layer_elements + weights.head_elements
    )
    assert kv_bytes_per_token(tmp_path, itemsize=2) == 4 * 2 * 4 * 32 * 2


def test_a_tied_head_is_streamed_too(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": np.zeros((7, 4), np.float32),
        "model.layers.0.mlp.up_proj.weight": np.zeros((6, 4), np.float32),
        "model.layers.0.mlp.experts.gate_up_proj": np.zeros((3, 8, 4), np.float32),
        "model.norm.weight": np.zeros(4, np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    weights = read_weights(tmp_path)
    assert set(weights.shapes) == {
        LinearShape(6, 4, 1),
        LinearShape(8, 4, 3),
        LinearShape(7, 4, 1),
    }
    assert (weights.layer_elements, weights.head_elements) == (24 + 96, 28)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no safetensors"):
        read_weights(tmp_path)
    with pytest.raises(ConfigurationError, match="no usable configuration"):
        kv_bytes_per_token(tmp_path, 4)


def test_the_roofline_is_the_slower_of_bytes_and_products() -> None:
    assert MACHINE.floor_s(num_bytes=20e9, flops=100e9) == pytest.approx(2.0)
    assert MACHINE.floor_s(num_bytes=1e9, flops=300e9) == pytest.approx(3.0)


def test_the_middle_half_leaves_outliers_out() -> None:
    assert sorted(middle_half([5.0, 1.0, 100.0, 4.0])) == [0, 3]
    assert middle_half([2.0]) == [0]
    assert sorted(middle_half([3.0, 1.0])) == [0, 1]


def test_three_repeats_are_made_whatever_they_take() -> None:
    hurried = Effort(repeats=9, budget_s=0.0)
    assert [hurried.goes_on(done, began_s=0.0) for done in range(5)] == [True] * 3 + [False] * 2
    assert not Effort(repeats=2, budget_s=1e9).goes_on(2, began_s=0.0)


def test_what_is_between_the_parts() -> None:
    parts = StepParts(
        whole=10.0, schedule=1.0, prepare=1.0, attention=2.0, linear=2.0, rest=1.0, sample=1.0,
        commit=0.5, publish=0.5,
    )  # fmt: skip
    assert parts.other == pytest.approx(1.0)
    assert replace(parts, attention=None, linear=None).other == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("name", "inside", "group"),
    [
        ("aten::mm", None, "matmul"),
        ("mkldnn::_linear_pointwise", None, "matmul"),
        ("aten::mm", "attention", "attention"),
        ("aten::argmax", "sampling", "sampling"),
        ("aten::mul", None, "small"),
        ("void flash::flash_fwd_splitkv_kernel<>", None, "attention"),
        ("BatchDecodeWithPagedKVCacheKernel", None, "attention"),
        ("nvjet_tst_128x64", None, "matmul"),
        ("vectorized_elementwise_kernel", None, "small"),
    ],
)
def test_groups_of_operations(name: str, inside: str | None, group: str) -> None:
    assert group_of(name, inside) == group


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--wrong"], "unrecognized arguments: --wrong"),
        (["--batches", "1,x"], "argument --batches: 'x' is no number above 0"),
        (["--threads", "0"], "argument --threads: '0' is no number above 0"),
        (["--only", "decode,lunch"], "'lunch' is none of decode, prefill"),
        (["--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
    ],
)
def test_a_wrong_flag_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        baton(["bench", "micro", *arguments])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("baton bench micro: error: ")
    assert said in told
    assert told.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert baton(["bench", "micro", "--model", str(tmp_path)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "measuring" not in line]
    assert len(errors) == 1
    assert "no usable configuration" in errors[0]


def test_quick_leaves_what_was_said_alone() -> None:
    options = micro.read_options(["--quick", "--batches", "3", "--repeats", "2"])
    assert (options.batches, options.repeats, options.contexts) == ([3], 2, [32])
    assert micro.read_options([]).contexts == [128, 1500]


def test_the_report_can_be_json() -> None:
    report = micro.Report({"model": "x"}, MACHINE)
    assert json.loads(report.as_json())["machine"]["copy_gb_s"] == 10.0
