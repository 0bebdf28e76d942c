import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.plain import parse_addresses
from cluster.status import ledger_error
from contracts.errors import ConfigurationError
from contracts.worker import Role

HEAVY = ("torch", "transformers", "ray", "pydantic", "fastapi", "grpc", "numpy")


def test_the_command_is_light_to_import() -> None:
    code = f"import sys, cluster.cli; print([m for m in {HEAVY} if m in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["serve", "worker", "router", "status"])
def test_help_tells_what_a_command_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"usage: baton {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("baton ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["serve"], "name a MODEL, or use --demo", id="no-model"),
        pytest.param(["serve", "--demo", "m"], "leave MODEL out", id="demo-and-model"),
        pytest.param(["serve", "/none", "--port", "0"], "no model folder '/none'", id="no-folder"),
        pytest.param(["serve", "m", "--kv-memory", "lots"], "is no size", id="bad-size"),
        pytest.param(["serve", "m", "--dtype", "int3"], "setting dtype", id="bad-dtype"),
        pytest.param(["worker", "decode", "m"], "no cluster key", id="worker-without-key"),
        pytest.param(["router", "m", "--decode", "nowhere"], "'nowhere' is no", id="bad-address"),
        pytest.param(["router", "m", "--decode", "h:1"], "no cluster key", id="router-without-key"),
        pytest.param(["status", "h:1"], "no cluster key", id="status-without-key"),
    ],
)
def test_wrong_settings_are_one_line_and_code_2(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BATON_CLUSTER_KEY", raising=False)
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("baton: error: ")
    assert message in error


def test_a_demo_folder_that_is_not_ours_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert main(["serve", "--demo", "--demo-dir", str(tmp_path)]) == 2
    assert "holds no demo model" in capsys.readouterr().err


def test_status_of_nobody_is_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_CLUSTER_KEY", "0123456789")
    assert main(["status", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().out.startswith("127.0.0.1:1: ")


def test_addresses() -> None:
    found = parse_addresses(Role.PREFILL, "one:1, two:2,")
    assert found == [(Role.PREFILL, "one:1"), (Role.PREFILL, "two:2")]
    assert parse_addresses(Role.DECODE, "") == []
    for text in ("host", ":1", "host:", "host:x", "host:70000"):
        with pytest.raises(ConfigurationError, match="write host:port"):
            parse_addresses(Role.DECODE, text)


GOOD = {"free": 5, "cached": 1, "owned": 2, "leased": 1, "reserved": 1, "quarantined": 0}


@pytest.mark.parametrize(
    ("ledger", "error"),
    [
        pytest.param({**GOOD, "total": 10}, None, id="adds-up"),
        pytest.param({**GOOD, "total": 11}, "= 10, not 11", id="a-block-is-missing"),
        pytest.param({**GOOD, "free": -1, "total": 4}, "no count of free", id="negative"),
        pytest.param({"total": 3}, "no count of free", id="states-missing"),
        pytest.param(None, "no ledger", id="no-ledger"),
    ],
)
def test_ledger_error(ledger: object, error: str | None) -> None:
    found = ledger_error({"ledger": ledger})
    if error is None:
        assert found is None
    else:
        assert found is not None
        assert error in found


@pytest.mark.parametrize(
    ("offload", "error"),
    [
        pytest.param({"total": 9, "free": 4, "cached": 3, "loading": 2}, None, id="adds-up"),
        pytest.param({"total": 9, "free": 4, "cached": 3, "loading": 1}, "add up", id="lost"),
        pytest.param({"total": 9, "free": 9, "cached": 0}, "add up", id="state-missing"),
        pytest.param({"total": 0, "free": -1, "cached": 0, "loading": 1}, "add up", id="negative"),
        pytest.param(3, "not readable", id="no-ledger"),
        pytest.param(None, None, id="another-version"),
    ],
)
def test_host_ledger_error(offload: object, error: str | None) -> None:
    found = ledger_error({"ledger": {**GOOD, "total": 10}, "offload": offload})
    assert (found is None) == (error is None)
    assert error is None or error in str(found)
