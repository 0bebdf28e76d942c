"""`baton bench micro` on a small model: all figures are there, finite, and add up."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import micro
from benchmarks.micro_engine import DoesNotFit, open_engine
from benchmarks.micro_parts import Stopwatch, watched, watched_step
from benchmarks.micro_sampler import KINDS
from benchmarks.split_pair import build_model

QUICK = ["--quick", "--threads", "1", "--repeats", "3"]


def numbers(value: Any) -> Iterator[float]:
    match value:
        case dict():
            for one in value.values():
                yield from numbers(one)
        case list():
            for one in value:
                yield from numbers(one)
        case int() | float():
            yield value


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "report.json"
    assert micro.main([*QUICK, *arguments, "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    assert all(math.isfinite(number) and number >= 0 for number in numbers(found))
    return found


def test_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path)
    assert found["skipped"] == []
    assert [(one["batch"], one["context"]) for one in found["decode"]] == [(1, 32), (4, 32)]
    assert [one["tokens"] for one in found["prefill"]] == [48]
    for one in [*found["decode"], *found["prefill"]]:
        parts = one["parts"]
        assert parts["attention"] > 0
        assert parts["linear"] > 0
        assert parts["sample"] > 0
        assert sum(ms for part, ms in parts.items() if part != "whole") <= parts["whole"] * 1.0001
        assert one["roofline"] > 0
    assert all(one["kv_of_copy"] > 0 for one in found["decode"])
    assert {(one["outputs"], one["inputs"]) for one in found["linear"]} == {
        (256, 256),
        (128, 256),
        (2048, 256),
    }
    assert {one["kind"] for one in found["sampler"]} == set(KINDS)
    assert [one["running"] for one in found["scheduler"]] == [1, 16]
    assert [one["num_bytes"] for one in found["transfer"]] == [16 << 10, 64 << 10, 256 << 10]
    table = capsys.readouterr().out
    for title in ("copy of", "decode", "prefill", "linear", "sampler", "scheduler", "KV transfer"):
        assert title in table


def test_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "--profile")
    kinds = [(one["kind"], one["batch"], one["context"]) for one in found["profile"]]
    assert kinds == [("decode", 1, 32), ("decode", 4, 32), ("prefill", 1, 48)]
    for one in found["profile"]:
        groups = one["groups"]
        assert set(groups) == {"attention", "matmul", "sampling", "small", "python"}
        assert min(groups.values()) > 0
        assert sum(groups.values()) == pytest.approx(one["wall_ms"])
        assert one["operations"] > len(one["top"])
    assert "largest operations" in capsys.readouterr().out


def test_watching_leaves_nothing_behind(tmp_path: Path) -> None:
    build_model(tmp_path)
    engine = open_engine(
        tmp_path, device="cpu", dtype="float32", threads=1, sizes=[(2, 64)], seed=0
    )
    backend = engine.backend
    forward, model_forward = backend.forward, engine.parts.model.module.forward
    watch = Stopwatch(engine.device)
    with engine.decoding(batch=2, context=40, steps=4):
        with watched(engine, watch):
            assert watched_step(engine, watch).attention
        assert engine.scheduler.load().running == 2
    assert backend.forward is forward
    assert engine.parts.model.module.forward == model_forward
    assert not any(one._forward_hooks for one in engine.parts.model.module.modules())
    assert not engine.scheduler.has_work
    ledger = engine.scheduler.pool.ledger()
    assert ledger.balanced
    assert ledger.idle


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    build_model(tmp_path)
    engine = open_engine(
        tmp_path, device="cpu", dtype="float32", threads=1, sizes=[(2, 64)], seed=0
    )
    for batch, context in ((64, 40), (1, 5000)):
        with pytest.raises(DoesNotFit), engine.decoding(batch, context, steps=4):
            pass
    assert engine.scheduler.pool.ledger().idle
