"""`baton bench load` against a stand-in server: counts, order and honesty, never speed."""

import asyncio
import io
import json
import math
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.client import ChatClient, Recording
from benchmarks.load import CANNOT_RUN, INTERRUPTED, Outcome, main, measure, parser
from benchmarks.metrics import Chunk, Phase, RequestRecord
from benchmarks.schedule import PlannedRequest
from benchmarks.summary import summarise
from tests.support.chat_standin import Behaviour, ChatStandIn

REPOSITORY = Path(__file__).parents[2]


@asynccontextmanager
async def standin(behaviour: Behaviour) -> AsyncIterator[ChatStandIn]:
    server = ChatStandIn(behaviour)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def load(server: ChatStandIn, *arguments: str) -> Outcome:
    defaults = ["--url", server.url, "--rate", "200", "--warmup", "0.1", "--output-tokens", "6"]
    return await measure(parser().parse_args([*defaults, *arguments]), io.StringIO())


def of_window(outcome: Outcome) -> list[RequestRecord]:
    return [record for record in outcome.records if record.phase is Phase.WINDOW]


async def test_every_request_of_the_window_is_measured() -> None:
    async with standin(Behaviour()) as server:
        outcome = await load(server, "--requests", "40", "--prompt-tokens", "101")
    summary = outcome.summary
    assert outcome.completed
    assert (summary.arrivals, summary.succeeded, summary.errors) == (40, 40, {})
    assert all(len(record.chunks) == 6 for record in of_window(outcome))
    assert {record.prompt_tokens for record in of_window(outcome)} == {101}  # 5 + 2 * 48 words
    assert summary.completion_tokens is not None
    assert summary.completion_tokens.mean == 6
    assert summary.cached_tokens == 40
    sent = {json.dumps(seen.body["messages"]) for seen in server.seen}
    assert len(sent) == len(server.seen)  # no prompt twice
    assert server.seen[0].body["model"] == "stand-in"
    assert outcome.config["workload"]["model"] == "stand-in"


async def test_stamps_agree_with_the_servers_own() -> None:
    """Client and server read one clock, so the stamps must interleave, whatever the machine."""
    async with (
        standin(Behaviour(first_s=0.002, gap_s=0.001)) as server,
        ChatClient(server.url) as client,
    ):
        for index in range(10):
            body = {"messages": [{"content": "x"}], "max_tokens": 5, "stream": True}
            planned = PlannedRequest(index, Phase.WINDOW, 0.0, 5, json.dumps(body).encode())
            recording = Recording(planned)
            await client.stream(recording, origin=0.0)
            record, seen = recording.record(), server.seen[index]
            assert record.error == ""
            assert record.sent_s is not None
            assert record.end_s is not None
            assert record.sent_s <= seen.received_s
            assert len(record.chunks) == len(seen.written_s) == 5
            stamps = [chunk.at_s for chunk in record.chunks]
            assert all(w <= c for w, c in zip(seen.written_s, stamps, strict=True))
            assert stamps == sorted(stamps)
            assert record.end_s >= stamps[-1]
            assert record.ttft_wire_s is not None
            assert record.ttft_wire_s >= 0.002


@pytest.mark.parametrize("running_usage", [True, False])
async def test_coalesced_chunks_still_count_all_tokens(running_usage: bool) -> None:
    async with standin(Behaviour(tokens_per_chunk=4, running_usage=running_usage)) as server:
        outcome = await load(server, "--requests", "5")
    expected = [4, 2] if running_usage else [1, 5]
    for record in of_window(outcome):
        assert [chunk.tokens for chunk in record.chunks] == expected
        assert record.completion_tokens == 6
        assert record.tpot_s is not None


async def test_refusals_and_cut_streams_are_errors_by_name() -> None:
    async with standin(Behaviour(refuse_every=4, cut_every=5)) as server:
        outcome = await load(server, "--requests", "60", "--slo-e2e-ms", "60000")
    errors = outcome.summary.errors
    assert set(errors) == {"cut off", "http 429"}
    assert outcome.summary.succeeded == 60 - sum(errors.values())
    assert outcome.summary.attainment is not None
    assert outcome.summary.attainment.met == outcome.summary.succeeded
    assert outcome.summary.attainment.arrivals == 60


async def test_a_server_that_never_ends_does_not_stop_the_arrivals() -> None:
    """An open loop: the arrivals go on, and the requests end by the time limit."""
    async with standin(Behaviour(hang_after_chunks=2)) as server:
        outcome = await load(server, "--requests", "10", "--timeout", "0.5")
        assert outcome.summary.errors == {"timeout": 10}
        assert all(len(record.chunks) == 2 for record in of_window(outcome))
        assert len(server.seen) > 10  # and the tail kept the load up
    assert outcome.reasons == ("no request succeeded",)


async def test_the_cap_shows_as_send_lag_and_spoils_the_run() -> None:
    async with standin(Behaviour(first_s=0.05)) as server:
        outcome = await load(server, "--requests", "20", "--concurrency-cap", "1")
    assert outcome.summary.succeeded == 20
    assert any(reason.startswith("late client") for reason in outcome.reasons)
    first, *_, last = of_window(outcome)
    assert first.sent_s is not None
    assert last.sent_s is not None
    assert last.sent_s - first.sent_s >= 19 * 0.05  # one after the other


async def test_every_figure_follows_from_the_written_records(tmp_path: Path) -> None:
    async with standin(Behaviour(refuse_every=7)) as server:
        outcome = await load(server, "--requests", "30", "--slo-ttft-ms", "1000")
    file = tmp_path / "run.json"
    file.write_text(json.dumps(outcome.to_json()))
    written = json.loads(file.read_text())
    records = [
        RequestRecord(
            **raw
            | {
                "phase": Phase(raw["phase"]),
                "chunks": tuple(Chunk(**chunk) for chunk in raw["chunks"]),
            }
        )
        for raw in written["requests"]
    ]
    assert tuple(records) == outcome.records
    again = summarise(records, written["window_s"], None)
    for name in ("arrivals", "succeeded", "errors", "output_tokens_per_s", "mean_concurrency"):
        assert written["summary"][name] == getattr(again, name)
    assert again.ttft_s is not None
    assert math.isclose(written["summary"]["ttft_s"]["p90"], again.ttft_s.p90)
    assert written["config"]["workload"]["salt"]
    assert written["schema"] == 1


async def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    """A process of its own, interrupted while every stream hangs."""
    file = tmp_path / "partial.json"
    async with standin(Behaviour(hang_after_chunks=3)) as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.load", "--url", server.url, "--rate", "50",
            "--warmup", "0", "--duration", "3600", "--json", str(file),
            cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            await asyncio.wait_for(server.streaming.wait(), 60)
            process.send_signal(signal.SIGINT)
            stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == INTERRUPTED, stderr.decode()
    assert "INVALID: interrupted" in stdout.decode()
    written = json.loads(file.read_text())
    assert written["completed"] is False
    assert written["valid"] is False
    assert written["requests"]
    assert {raw["error"] for raw in written["requests"]} == {"unfinished"}


def test_no_server_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:9", "--requests", "1"]) == CANNOT_RUN
    captured = capsys.readouterr()
    assert captured.err.startswith("baton bench load: GET http://127.0.0.1:9/v1/models: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--rate", "0"], id="rate"),
        pytest.param(["--rate", "inf"], id="infinite"),
        pytest.param(["--duration", "5", "--requests", "5"], id="both-lengths"),
        pytest.param(["--prompt-tokens", "9-1"], id="range"),
        pytest.param(["--requests", "0"], id="no-requests"),
        pytest.param(["--warmup", "-1"], id="warm-up"),
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: baton bench load" in capsys.readouterr().err
