"""A slice of the fault campaign (docs/reliability.md), and that its checks can fail.

BATON_FAULT_RUNS and BATON_FAULT_SEED choose another slice.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.campaign.answers import (
    Alternatives,
    Wrong,
    canonical,
    differences,
    is_start_of,
    joined,
)
from tests.faults.campaign.client import Reply
from tests.faults.campaign.report import percentiles
from tests.faults.campaign.runner import FAULTS, Part, fault_of
from tests.faults.campaign.traffic import questions

RUNS = int(os.environ.get("BATON_FAULT_RUNS", "220"))
SEED = int(os.environ.get("BATON_FAULT_SEED", "4"))
REPOSITORY = Path(__file__).parents[2]


def campaign(folder: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Exit status, output and report of a campaign in processes of its own."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "tests.faults.campaign", "--json", str(report), *arguments]
    process = subprocess.Popen(
        [*command, "--logs", str(folder / "logs")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)
        raise AssertionError(f"the campaign hangs: {output[-4000:]}") from None
    finally:
        process.kill()
        process.wait()
    return process.returncode, output, json.loads(report.read_text())


def test_a_slice_of_the_campaign(tmp_path: Path) -> None:
    status, output, report = campaign(
        tmp_path, "--runs", str(RUNS), "--seed", str(SEED), "--pool", "80"
    )
    assert status == 0, output[-6000:]
    assert report["failures"] == []
    assert report["runs"] == RUNS
    rows = report["faults"]
    assert set(rows) == set(FAULTS), "every fault once at least"
    assert sum(row["struck"] for row in rows.values()) > RUNS * 0.6, "faults miss their moments"
    served = sum(row["served"].get("recomputed", 0) for row in rows.values())
    assert served > 10, "no fault reaches a handoff"
    assert rows["blocks_reused"]["served"].get("cause FenceBroken", 0) > 0
    assert report["releases"]


def test_a_missing_fence_is_found_out(tmp_path: Path) -> None:
    """With a D that believes any generation, reused blocks give wrong tokens, which are noticed."""
    arguments = ("--fault", "blocks_reused", "--no-fence", "--clusters", "1", "--pool", "28")
    status, output, report = campaign(
        tmp_path, "--runs", "12", "--first", "1000", "--stop-after", "1", *arguments
    )
    assert status == 1, output[-6000:]
    assert any("token_ids" in failure or ".text" in failure for failure in report["failures"])
    assert "FAILED seed 1 index 100" in output
    logs = [failure.partition("logs: ")[2] for failure in report["failures"]]
    assert all(list(Path(folder).glob("d0-*.log")) for folder in logs if folder)
    assert any(logs)


# -- the checks themselves ------------------------------------------------------------------


def reply(body: str, status: int = 200, **changes: Any) -> Reply:
    return Reply(status=status, body=body.encode(), complete=True, **changes)


def stream(*events: dict[str, Any], done: bool = True) -> str:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join(lines) + ("data: [DONE]\n\n" if done else "")


def part(text: str, ids: list[int], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": finish}
    return {"choices": [choice]}


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
END = {"choices": [], "usage": USAGE}
WHOLE = {"choices": [{**part("ab", [1, 2], "stop")["choices"][0]}], "usage": USAGE}


def test_streams_and_full_answers_look_alike() -> None:
    streamed = canonical(reply(stream(part("a", [1]), part("b", [2], "stop"), END)), stream=True)
    full = canonical(reply(json.dumps(WHOLE)), stream=False)
    assert streamed == full
    assert differences(full, streamed) == ""


@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        pytest.param(stream(part("a", [1], "stop"), END, done=False), 200, "DONE", id="no-end"),
        pytest.param(stream(part("a", [1]), END), 200, "no end", id="no-finish"),
        pytest.param(stream(part("a", [1], "stop")), 200, "usage", id="no-usage"),
        pytest.param(stream(part("a", [1], "stop"), END, END), 200, "twice", id="usage-twice"),
        pytest.param(
            stream(part("a", [1], "stop"), part("b", [2]), END), 200, "follows", id="after-the-end"
        ),
        pytest.param(stream({"error": {"code": 500}}), 200, "error", id="error-in-the-stream"),
        pytest.param("{}", 503, "HTTP 503", id="refused"),
    ],
)
def test_bad_streams_are_found(body: str, status: int, complaint: str) -> None:
    with pytest.raises(Wrong, match=complaint):
        canonical(reply(body, status), stream=True)


def test_a_broken_connection_is_found() -> None:
    with pytest.raises(Wrong, match="broke"):
        canonical(Reply(status=200, body=stream(END).encode(), problem="EOF"), stream=True)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param({"a": [1, 2]}, {"a": [1, 2]}, True, id="equal"),
        pytest.param({"a": [1, 2]}, {"a": [1, 3]}, False, id="another-token"),
        pytest.param({"a": [1, 2]}, {"a": [1]}, False, id="a-token-less"),
        pytest.param({"a": -1.0}, {"a": -1.00005}, True, id="rounding"),
        pytest.param({"a": -1.0}, {"a": -1.001}, False, id="another-probability"),
        pytest.param({"a": "x"}, {"a": None}, False, id="nothing"),
        pytest.param({"a": "x"}, {}, False, id="missing"),
    ],
)
def test_differences(one: Any, other: Any, same: bool) -> None:
    assert (differences(one, other) == "") is same


@pytest.mark.parametrize(
    ("found", "same"),
    [
        pytest.param([("a", -1.0), ("b", -2.00005)], True, id="rounding"),
        pytest.param([("a", -1.0), ("c", -2.0)], True, id="a-tie-for-the-last-place"),
        pytest.param([("c", -1.0), ("b", -2.0)], False, id="another-token"),
        pytest.param([("a", -1.0), ("b", -2.1)], False, id="another-probability"),
        pytest.param([("a", -1.0)], False, id="one-less"),
    ],
)
def test_alternatives(found: list[tuple[str, float]], same: bool) -> None:
    expected = Alternatives([("a", -1.0), ("b", -2.0)])
    assert (differences(expected, Alternatives(found)) == "") is same


def test_a_cut_stream_is_a_beginning() -> None:
    whole = canonical(reply(json.dumps(WHOLE)), stream=False)
    assert is_start_of(whole, joined([part("a", [1])], partial=True)) == ""
    assert "token_ids" in is_start_of(whole, joined([part("a", [7])], partial=True))


def test_all_derives_from_the_seed() -> None:
    part_of = [Part(seed, range(400)) for seed in (1, 1, 2)]
    faults = [[fault_of(part, index).name for index in part.indices] for part in part_of]
    assert faults[0] == faults[1] != faults[2]
    assert set(faults[0][: len(FAULTS)]) == set(FAULTS)
    assert questions(1) == questions(1) != questions(2)


def test_percentiles() -> None:
    assert percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p99": 3.0, "max": 3.0}
