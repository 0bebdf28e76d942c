"""A slice of the soak itself, some seconds long: real processes, mixed traffic, idle points."""

import csv
import json
from pathlib import Path

import pytest

from cluster.demo_model import ensure_demo_model
from tests.soak.__main__ import run, seconds
from tests.soak.drive import Settings
from tests.soak.processes import Usage
from tests.soak.record import STATES, Record, Sample, WorkerState
from tests.soak.report import judge, passed, summary, table, write

PROCESSES = ("prefill", "decode", "router")
MIB = 1 << 20
PERIODS = 2
REQUESTS = 35  # a period


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    folder = tmp_path_factory.mktemp("soak")
    settings = Settings(
        duration_s=180.0,  # by the clock it ends only where the machine is very busy
        seed=3,
        requests=PERIODS * REQUESTS,
        period_requests=REQUESTS,
        sample_s=0.5,
        num_references=6,
        progress_s=0.0,
    )
    record, elapsed_s = run(settings, folder, ensure_demo_model(folder / "demo"))
    write(record, judge(record), {"seed": settings.seed}, elapsed_s, folder)
    return record, folder


def test_nothing_fails_and_answers_repeat(short: tuple[Record, Path]) -> None:
    tally = short[0].tally
    assert not tally.failures, tally.examples
    assert tally.done == PERIODS * REQUESTS
    assert tally.compared >= 10
    endings = {how for _, how in tally.ended}
    assert endings == {"answered", "left", "refused"}
    assert {kind for kind, _ in tally.ended} >= {"two-step adopt", "structured", "mutated"}


def test_ledgers_are_idle_in_every_pause(short: tuple[Record, Path]) -> None:
    record = short[0]
    assert len(record.idle_points) == 1 + PERIODS
    for role in ("prefill", "decode"):
        idle = [sample.worker for sample in record.of(role, idle=True)]
        assert len(idle) == 1 + PERIODS
        assert all(worker is not None and worker.idle for worker in idle)
        last = idle[-1]
        assert last is not None
        assert last.blocks["cached"] > 0, "it computed nothing"
    assert all(sample.running == 0 for sample in record.of("router", idle=True))


def test_descriptors_and_threads_stay(short: tuple[Record, Path]) -> None:
    findings = judge(short[0])
    assert {f.process for f in findings} >= set(PROCESSES)
    assert [f for f in findings if not f.flat] == []
    for process in PROCESSES:
        last = short[0].of(process, idle=True)[-1].usage
        assert last.fds > 3
        assert last.threads > 1
        assert 20 * MIB < last.uss <= last.rss < 4096 * MIB


def test_files_are_written(short: tuple[Record, Path]) -> None:
    record, folder = short
    rows = list(csv.DictReader((folder / "samples.csv").read_text().splitlines()))
    assert len(rows) == len(record.samples)
    row = next(row for row in rows if row["process"] == "decode" and row["idle"] == "1")
    assert int(row["free_blocks"]) + int(row["cached_blocks"]) == 256
    told = json.loads((folder / "summary.json").read_text())
    assert told["passed"]
    assert told["requests"] == record.tally.done
    assert (folder / "soak.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "</svg>" in (folder / "soak.svg").read_text(encoding="utf-8")


def made_up(growth_mib: float) -> Record:
    """Forty idle points in two hours."""
    record = Record()
    blocks = dict.fromkeys(STATES, 0) | {"free": 6, "cached": 250}
    for number in range(40):
        rss = int((100 + growth_mib * number / 40) * MIB)
        worker = WorkerState(blocks, 256, 0, 0)
        usage = Usage("decode", 1, rss, rss, 38, 16, 14)
        record.samples.append(Sample(180.0 * number, True, usage, worker, None, 9 * number, 0))
        record.idle_points.append((180.0 * number, 0.1))
    return record


def test_a_leak_is_told_everywhere(tmp_path: Path) -> None:
    good, bad = made_up(1.0), made_up(100.0)
    assert passed(good, judge(good))
    findings = judge(bad)
    assert not passed(bad, findings)
    assert summary(bad, findings, {}, 7200.0)["passed"] is False
    text = table(bad, findings, 7200.0)
    assert "NOT FLAT: decode rss: grew" in text
    assert text.endswith("NOT passed")


def test_a_failure_is_told(tmp_path: Path) -> None:
    record = made_up(0.0)
    record.tally.fail("differs: token_ids of choice 0")
    assert not passed(record, judge(record))
    assert "FAILED: 1 x differs" in table(record, judge(record), 7200.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2h", 7200), ("1h30m", 5400), ("90s", 90), ("45", 45), ("0.5h", 1800), ("1m5s", 65)],
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "h", "-3", "0", "2 hours", "5m1h"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        seconds(text)
