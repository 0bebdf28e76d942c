"""rpc/pb is what the compiler makes of proto/: nobody forgot to regenerate, nobody edited it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    pytest.importorskip("mypy_protobuf")
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
    plugin = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
    done = subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-Irpc/pb=proto"]
        + ([f"--plugin=protoc-gen-mypy_grpc={plugin}"] if plugin.exists() else [])
        + [*outputs, "rpc/pb/worker.proto"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fresh = {path.name: path.read_text() for path in (tmp_path / "rpc" / "pb").iterdir()}
    committed = {
        path.name: path.read_text()
        for path in (ROOT / "rpc" / "pb").iterdir()
        if path.name.startswith("worker_pb2")
    }
    assert sorted(fresh) == sorted(committed)
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert stale == [], "run `make proto`"
