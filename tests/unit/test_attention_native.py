"""The compiled backend against attention written out densely, and how it is come by."""

import ctypes
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.attention import native_build
from engine.attention.base import AttentionLayer, StepBatch
from engine.attention.native import NativeBackend
from engine.attention.native_build import native_library
from engine.attention.select import select_backend
from engine.kv_cache import KvCache, KvSpec
from engine.packed import NativeRmsNorm, PackedLinear, pack
from tests.support.dense_attention import check, layer

KINDS = [
    pytest.param(layer(head_dim=16), id="full"),
    pytest.param(layer(heads=2, head_dim=64), id="no-sharing"),
    pytest.param(layer(heads=6, head_dim=80), id="three-heads-share"),
    pytest.param(layer(heads=16, head_dim=128), id="eight-heads-share"),
    pytest.param(layer(head_dim=48, window=5), id="window"),
    pytest.param(layer(head_dim=32, window=1), id="window-of-itself"),
    pytest.param(layer(head_dim=96, window=37), id="longer-window"),
    pytest.param(layer(head_dim=20), id="odd-size"),
    pytest.param(layer(head_dim=16, window=6, softcap=2.0, sinks=True), id="by-torch"),
]
BATCHES = [
    pytest.param([(0, 1)], id="one-token"),
    pytest.param([(0, 9)], id="fresh-prefill"),
    pytest.param([(4, 9)], id="later-chunk"),
    pytest.param([(0, 33), (40, 64), (3, 2)], id="prefills"),
    pytest.param([(15, 1), (16, 1), (14, 1), (31, 1)], id="decode-at-the-vectors-edge"),
    pytest.param([(3, 1), (900, 1), (0, 1), (61, 1)], id="decode-of-unlike-lengths"),
    pytest.param([(30, 1), (0, 13), (5, 3), (2, 1), (17, 20)], id="mixed"),
]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = native_library()
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", BATCHES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)]
)
def test_equals_dense_attention(
    library: ctypes.CDLL,
    kind: AttentionLayer,
    lengths: list[tuple[int, int]],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    check(NativeBackend(library), kind, lengths, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("window", [None, 700])
def test_long_chunks_take_several_tiles(
    library: ctypes.CDLL, threads: int, window: int | None
) -> None:
    kind = layer(head_dim=64, window=window)
    lengths = [(300, 900), (0, 1100), (1500, 1), (1499, 1)]
    check(NativeBackend(library), kind, lengths, dtype=torch.bfloat16, tolerance=2e-2)
    check(NativeBackend(library), kind, lengths)


def test_scores_far_apart_do_not_overflow(library: ctypes.CDLL) -> None:
    kind = AttentionLayer(1, 4, 2, 32, 40.0)
    check(NativeBackend(library), kind, [(20, 1), (0, 40), (7, 30)], tolerance=1e-4)
    check(NativeBackend(library), kind, [(20, 1), (0, 40)], dtype=torch.bfloat16, tolerance=2e-2)


def test_a_token_gets_the_same_alone_and_in_a_crowd(library: ctypes.CDLL) -> None:
    """To the bit: what else is in the step changes no token."""
    torch.manual_seed(0)
    cache = KvCache(KvSpec(1, 2, 64, 16, torch.bfloat16), 40, torch.device("cpu"))
    cache.tensor.normal_()
    kind = AttentionLayer(0, 4, 2, 64, 0.125)
    query = torch.randn(6, 4, 64).bfloat16()

    def attend(rows: list[int]) -> torch.Tensor:
        lens = np.asarray([37 + 40 * row for row in rows])
        backend = NativeBackend(library)
        backend.prepare(
            StepBatch(
                query_starts=np.arange(len(rows) + 1),
                query_lens=np.ones(len(rows), dtype=np.int64),
                kv_lens=lens,
                tables=[np.arange(row, row + 20) for row in rows],
                write_rows=torch.empty(0, dtype=torch.int64),
            ),
            cache,
        )
        return backend.attend(kind, query[rows], query[rows], query[rows], None)

    together = attend([0, 1, 2, 3, 4, 5])
    for row in range(6):
        assert torch.equal(attend([row])[0], together[row])


def test_the_cpu_gets_it(library: ctypes.CDLL) -> None:
    assert select_backend(torch.device("cpu")).name == "native-paged"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of compiled libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library.cache_clear()
    yield tmp_path / "baton" / "native"
    native_library.cache_clear()


def test_it_is_compiled_once(library: ctypes.CDLL, elsewhere: Path) -> None:
    assert native_library() is not None
    (made,) = elsewhere.iterdir()
    at = made.stat().st_mtime_ns
    native_library.cache_clear()
    assert native_library() is not None
    assert [file.stat().st_mtime_ns for file in elsewhere.iterdir()] == [at]


def test_without_a_compiler_torch_serves(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with caplog.at_level(logging.WARNING):
        assert select_backend(torch.device("cpu")).name == "sdpa-paged"
    assert "no/such/compiler" in caplog.text


def test_a_compiler_that_fails_is_quoted(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*command: str) -> str:
        if "--version" in command:
            return "a compiler\n"
        raise subprocess.CalledProcessError(1, command, stderr="no such instruction\nmore")

    monkeypatch.setattr(native_build, "_run", failing)
    assert native_library() is None
    assert "no such instruction" in caplog.text
    assert not list(elsewhere.iterdir())


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    monkeypatch.setenv("BATON_NATIVE", "0")
    assert native_library() is None


# -- packed linear layers -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_layers_compute_the_same(dtype: torch.dtype, bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(72, 130, bias=bias).to(dtype).requires_grad_(False)
    model = torch.nn.Sequential(plain)
    packing = pack(model)
    assert isinstance(model[0], PackedLinear)
    assert (model[0].weight.shape, model[0].weight.dtype) == ((130, 72), dtype)
    x = torch.randn(1, rows, 72).to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x))
    packing.undo()
    assert not isinstance(model[0], PackedLinear)
    assert model[0].weight is plain.weight


def test_only_plain_layers_are_packed() -> None:
    class Own(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(
        Own(8, 8), torch.nn.Linear(8, 8).half(), torch.nn.Linear(8, 8), torch.nn.ReLU()
    ).requires_grad_(False)
    shared = model[2]
    model.append(shared)
    pack(model)
    kinds = [type(part).__name__ for part in model]
    assert kinds == ["Own", "Linear", "PackedLinear", "ReLU", "PackedLinear"]
    assert model[2] is model[4]


def test_a_layer_that_packs_wrong_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).requires_grad_(False)
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: x * 0)
    with caplog.at_level(logging.INFO):
        assert not pack(model).replaced
    assert not any(isinstance(part, PackedLinear) for part in model)
    assert "computes something else" in caplog.text


class OwnRMSNorm(torch.nn.Module):
    """As many models write it; `shift`: as some others do."""

    def __init__(self, dim: int, shift: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(dim) + 0.5, requires_grad=False)
        self.variance_epsilon = 1e-5
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight + self.shift) * wide.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 50])
def test_rms_norms_compute_the_same(library: ctypes.CDLL, dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(0)
    norm = OwnRMSNorm(dim).to(dtype)
    model = torch.nn.Sequential(norm)
    pack(model)
    assert isinstance(model[0], NativeRmsNorm)
    x = torch.randn(1, 3, 7, dim).to(dtype).transpose(1, 2)  # as a norm of heads gets it
    torch.testing.assert_close(model(x), norm(x))


def test_a_norm_of_another_dtype_is_the_models_own(library: ctypes.CDLL) -> None:
    norm = OwnRMSNorm(16).to(torch.bfloat16)
    model = torch.nn.Sequential(norm)
    pack(model)
    x = torch.randn(2, 16)
    torch.testing.assert_close(model(x), norm(x))


def test_other_norms_stay(library: ctypes.CDLL) -> None:
    model = torch.nn.Sequential(OwnRMSNorm(16, shift=1.0), torch.nn.LayerNorm(16))
    assert not pack(model).replaced
