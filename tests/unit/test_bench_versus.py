"""Comparing engines: models, prompts, figures, ratios, and whole runs against small servers."""

import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from safetensors import safe_open
from tokenizers import Tokenizer

from benchmarks import versus
from benchmarks.metrics import Chunk, Phase, RequestRecord
from benchmarks.peers.process import Part, Running, System, SystemFailed
from benchmarks.peers.proxy import PrefillRefused, Proxy, decode_body, prefill_body
from benchmarks.peers.systems import Setup, UnknownSystem, make_system
from benchmarks.schedule import PlannedRequest
from benchmarks.versus_load import BadTurn, Cell, Figures, PeerRecording, figures, medians
from benchmarks.versus_model import SIZES, Prompts, Shape, _to_bf16, ensure_model
from benchmarks.versus_report import compare, default_pairs, ratios_table
from tests.support.rpc_fakes import eventually

TINY = Shape("llama", 2048, 16, 1, 2, 1, 8, 16)
SERVER = Path(__file__).parents[1] / "support" / "echo_chat_server.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_model(tmp_path_factory.mktemp("models") / "tiny", TINY)


def test_a_model_holds_what_its_shape_says(folder: Path) -> None:
    header_end = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((folder / "model.safetensors").read_bytes()[8:header_end])
    with safe_open(folder / "model.safetensors", "np") as file:
        names = set(file.keys())  # the library has checked offsets and sizes
    tensors = {name: entry for name, entry in header.items() if name in names}
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    assert sum(int(np.prod(entry["shape"])) for entry in tensors.values()) == TINY.parameters
    assert "model.layers.0.self_attn.q_norm.weight" not in names


def test_a_model_is_built_once_and_again_for_another_shape(tmp_path: Path) -> None:
    target = tmp_path / "model"
    ensure_model(target, TINY)
    (target / "kept").touch()
    assert (ensure_model(target, TINY) / "kept").exists()
    other = Shape("qwen3", 2048, 16, 1, 2, 1, 8, 16)
    assert not (ensure_model(target, other) / "kept").exists()
    assert json.loads((target / "config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        pytest.param("4m", (3.5, 4.5), id="4m"),
        pytest.param("60m", (54, 66), id="60m"),
        pytest.param("470m", (450, 490), id="470m"),
    ],
)
def test_sizes_are_what_they_are_called(size: str, millions: tuple[float, float]) -> None:
    assert millions[0] < SIZES[size].parameters / 1e6 < millions[1]


def test_bf16_rounds_to_nearest_even() -> None:
    ulp = 2.0**-7  # of bfloat16 at 1
    values = np.array([1.0, 1.0 + 0.5 * ulp, 1.0 + 1.5 * ulp, 1.0 + 0.51 * ulp, -2.0], np.float32)
    back = (_to_bf16(values).astype(np.uint32) << 16).view(np.float32)
    assert back.tolist() == [1.0, 1.0, 1.0 + 2 * ulp, 1.0 + ulp, -2.0]


def test_prompts_have_the_wanted_length_and_differ(folder: Path) -> None:
    prompts = Prompts(folder)
    for wanted in (prompts.overhead_tokens + 1, 64, 256, 1500):
        assert prompts.count(prompts.make(wanted, "seed")) == wanted
    assert prompts.make(64, "a") == prompts.make(64, "a")
    assert prompts.make(64, "a").split()[:4] != prompts.make(64, "b").split()[:4]
    with pytest.raises(ValueError, match="more than"):
        prompts.make(prompts.overhead_tokens, "seed")


def test_every_token_of_the_vocabulary_has_text_of_its_own(folder: Path) -> None:
    """So that no stream is silent for a token that was made."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == TINY.vocab_size
    texts = [tokenizer.decode([number]) for number in range(3 + 256, TINY.vocab_size)]
    assert all(texts)
    assert not any("\ufffd" in text for text in texts)


def record(**changes: Any) -> RequestRecord:
    known: dict[str, Any] = {
        "index": 0,
        "phase": Phase.WINDOW,
        "intended_s": 0.0,
        "wanted_tokens": 4,
        "sent_s": 1.0,
        "chunks": (Chunk(1.5, 1), Chunk(1.6, 1), Chunk(1.8, 2)),
        "end_s": 2.0,
        "prompt_tokens": 7,
        "completion_tokens": 4,
    }
    return RequestRecord(**{**known, **changes})


def test_figures_of_a_turn() -> None:
    later = record(sent_s=2.0, chunks=(Chunk(2.1, 4),), end_s=5.0)
    one = figures([record(), later], prompt_tokens=7, output_tokens=4)
    assert one.output_tokens_per_s == pytest.approx(8 / 4.0)
    assert one.ttft_p50_s == pytest.approx(0.3)  # of 0.5 and 0.1: from each one's own sending
    assert one.itl_p50_s == pytest.approx(0.15)
    assert one.tpot_p50_s == pytest.approx(0.1)
    assert one.chunk_tokens == 2.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"error": "http 500"}, "http 500", id="failed"),
        pytest.param({"chunks": ()}, "no token came", id="silent"),
        pytest.param({"prompt_tokens": 8}, "8 prompt and 4 output", id="other-prompt"),
        pytest.param({"completion_tokens": 5}, "7 prompt and 5 output", id="other-answer"),
    ],
)
def test_a_turn_that_says_nothing(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadTurn, match=reason):
        figures([record(), record(**changes)], prompt_tokens=7, output_tokens=4)


def test_usage_in_the_last_chunk_of_a_choice_is_no_token() -> None:
    noted = PeerRecording(PlannedRequest(0, Phase.WINDOW, 0.0, 2, b""))
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    events: list[dict[str, Any]] = [
        {"choices": [{"delta": {"role": "assistant"}}]},
        {"choices": [{"delta": {"content": "a"}}]},
        {"choices": [{"delta": {"content": "b"}}]},
        {"choices": [{"delta": {}, "finish_reason": "length"}], "usage": usage},
    ]
    for at_s, event in enumerate(events):
        noted.take(event, float(at_s))
    assert noted.record().chunks == (Chunk(1.0, 1), Chunk(2.0, 1))
    assert noted.record().prompt_tokens == 7
    assert noted.record().error == ""  # a finish reason is an end, without [DONE]


def some(rate: float, ttft_s: float = 1.0, itl_s: float = 0.01) -> Figures:
    return Figures(rate, ttft_s, 2 * ttft_s, itl_s, 2 * itl_s, itl_s, 1.0)


@pytest.mark.parametrize(
    ("ours", "misses"),
    [
        pytest.param(some(120.0), (), id="exactly-met"),
        pytest.param(some(119.0), ("tokens/s",), id="too-slow"),
        pytest.param(some(200.0, ttft_s=1.1), ("ttft_p50", "ttft_p99"), id="later-first-token"),
        pytest.param(some(200.0, itl_s=0.011), ("itl_p50", "itl_p99"), id="longer-gaps"),
    ],
)
def test_verdicts(ours: Figures, misses: tuple[str, ...]) -> None:
    cell = Cell(256, 8)
    pair = ("baton-aggregated", "vllm-aggregated")
    found = compare({(pair[0], cell): ours, (pair[1], cell): some(100.0)}, [pair], [cell])
    assert [one.misses for one in found] == [misses]
    assert ("pass" in ratios_table(found)) == (not misses)


def test_a_pair_without_a_target_gets_no_verdict_and_a_gap_no_row() -> None:
    cells = [Cell(256, 1), Cell(256, 8)]
    found = compare({("a", cells[0]): some(1.0), ("b", cells[0]): some(2.0)}, [("a", "b")], cells)
    assert [(one.cell, one.misses, one.tokens_per_s) for one in found] == [(cells[0], None, 0.5)]


def test_medians_are_of_each_figure() -> None:
    middle = medians([some(1.0, ttft_s=3.0), some(2.0, ttft_s=1.0), some(9.0, ttft_s=2.0)])
    assert (middle.output_tokens_per_s, middle.ttft_p50_s) == (2.0, 2.0)


def test_default_pairs() -> None:
    assert default_pairs(["vllm-1p1d", "x", "baton-1p1d"]) == [("baton-1p1d", "vllm-1p1d")]
    assert default_pairs(["x", "y", "z"]) == [("x", "y"), ("x", "z")]


def test_systems_from_the_command_line(tmp_path: Path) -> None:
    setup = Setup(tmp_path, cores=2, vllm_bin=tmp_path / "bin", kv_gib=3)
    assert make_system("a=http://h:1/", setup) == System("a", "http://h:1")
    own = make_system("b=serve {model} --port {port}", setup)
    assert own.parts[0].command[:2] == ("serve", str(tmp_path))
    assert own.url.endswith(own.parts[0].command[-1])
    vllm = make_system("vllm-1p1d", setup)
    assert [part.env.get("VLLM_CPU_OMP_THREADS_BIND") for part in vllm.parts] == ["0", "1", None]
    baton = make_system("baton-1p1d", setup)
    assert len({part.env["BATON_CLUSTER_KEY"] for part in baton.parts}) == 1
    assert [part.command[3] for part in baton.parts] == ["worker", "worker", "router"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("nobody", id="unknown"),
        pytest.param("=http://h:1", id="no-name"),
        pytest.param("x=serve {model}", id="no-port"),
        pytest.param("vllm-aggregated", id="no-vllm"),
    ],
)
def test_systems_that_cannot_be(text: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownSystem):
        make_system(text, Setup(tmp_path, cores=2))


@pytest.mark.parametrize("system", ["baton-aggregated", "baton-1p1d"])
def test_our_own_commands_parse(system: str, tmp_path: Path) -> None:
    from cluster.cli import make_parser

    for part in make_system(system, Setup(tmp_path, cores=2)).parts:
        assert make_parser().parse_args(part.command[3:]).model == str(tmp_path)


def test_what_the_proxy_asks() -> None:
    body = {"model": "m", "messages": [], "max_tokens": 64, "stream": True, "stream_options": {}}
    asked = prefill_body(body)
    assert (asked["max_tokens"], asked["stream"], "stream_options" in asked) == (1, False, False)
    assert asked["kv_transfer_params"]["do_remote_decode"] is True
    assert decode_body(body, {"kv_transfer_params": {"k": 1}}) == body | {
        "kv_transfer_params": {"k": 1}
    }
    with pytest.raises(PrefillRefused):
        decode_body(body, {"choices": []})


async def test_the_proxy_asks_p_then_streams_from_d() -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    async def prefill(request: web.Request) -> web.Response:
        asked.append(("p", await request.json()))
        if not asked[-1][1]["messages"]:
            return web.Response(status=400, text="no messages")
        return web.json_response({"kv_transfer_params": {"remote": "p"}})

    async def decode(request: web.Request) -> web.Response:
        asked.append(("d", await request.json()))
        return web.Response(text="data: [DONE]\n\n", content_type="text/event-stream")

    def app(chat: Callable[[web.Request], Awaitable[web.Response]]) -> web.Application:
        made = web.Application()
        made.router.add_post("/v1/chat/completions", chat)
        return made

    async with TestServer(app(prefill)) as p, TestServer(app(decode)) as d:
        proxy = Proxy(str(p.make_url("")).rstrip("/"), str(d.make_url("")).rstrip("/"))
        async with TestClient(TestServer(proxy.make_app())) as client:
            body = {"messages": [{"role": "user"}], "max_tokens": 5, "stream": True}
            reply = await client.post("/v1/chat/completions", json=body)
            assert (reply.status, await reply.text()) == (200, "data: [DONE]\n\n")
            refused = await client.post("/v1/chat/completions", json=body | {"messages": []})
            assert (refused.status, await refused.text()) == (400, "no messages")
    assert asked[:2] == [
        ("p", prefill_body(body)),
        ("d", body | {"kv_transfer_params": {"remote": "p"}}),
    ]
    assert [who for who, _ in asked] == ["p", "d", "p"]


async def test_a_process_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    part = Part((sys.executable, "-c", "raise SystemExit('no such model')"), health_url="http://x")
    running = Running(System("broken", "http://x", (part,)), tmp_path)
    with pytest.raises(SystemFailed, match="broken: process 0 ended with status 1"):
        await running.start(30.0)
    assert "no such model" in (tmp_path / "broken-0.log").read_text()


async def test_stop_ends_a_process_that_ignores_sigterm_and_its_child(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    program = (
        "import signal, subprocess, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(ready)!r}).write_text('')\n"
        "time.sleep(600)\n"
    )
    running = Running(System("deaf", "", (Part((sys.executable, "-c", program)),)), tmp_path)
    running.term_s = 0.2
    await running.start(30.0)
    await eventually(ready.exists, 30.0)
    family = running.processes()
    assert len(family) == 2
    assert running.resident_bytes() > 0
    await running.stop()
    await running.stop()
    await eventually(lambda: not any(map(is_alive, family)), 30.0)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def options(tmp_path: Path, *more: str) -> list[str]:
    command = f"{sys.executable} {SERVER} {{model}} {{port}}"
    return [
        *("--system", f"a={command}", "--system", f"b={command}", "--prompt-tokens", "32"),
        *("--concurrency", "1,2", "--output-tokens", "4", "--rounds", "2", "--settle", "0"),
        *("--idle-look", "0.05", "--foreign-cores", "99"),
        *("--models", str(tmp_path / "models"), "--logs", str(tmp_path / "logs")),
        *("--json", str(tmp_path / "out.json"), *more),
    ]


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert versus.main(options(tmp_path, "--idle-cores", "2")) == 0
    outcome = json.loads((tmp_path / "out.json").read_text())
    order = [(turn["system"], turn["cell"]["concurrency"]) for turn in outcome["turns"]]
    assert order == [(name, many) for many in (1, 2) for name in "abba"]
    assert {one["theirs"] for one in outcome["comparisons"]} == {"b"}
    assert len(outcome["comparisons"]) == 2
    assert "no target" in capsys.readouterr().out
    prompts = json.loads((tmp_path / "logs" / "a-0.log").read_text().splitlines()[-1])
    assert prompts["seen"] == prompts["different"] > 0


def test_a_restless_system_is_suspended_between_its_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[set[str]] = []

    class Watched(Running):
        def pause(self) -> None:
            super().pause()
            deadline = time.monotonic() + 10.0  # a signal takes its time
            while statuses(self) != {psutil.STATUS_STOPPED} and time.monotonic() < deadline:
                pass
            states.append(statuses(self))

    def statuses(running: Running) -> set[str]:
        return {member.status() for member in running.processes()}

    monkeypatch.setattr(versus, "Running", Watched)
    assert versus.main(options(tmp_path, "--idle-cores", "-1", "--concurrency", "1")) == 0
    assert states == [{psutil.STATUS_STOPPED}] * 6  # two systems: a first look and two turns each
    log = (tmp_path / "logs" / "a-0.log").read_text()
    assert len(log.splitlines()) == 1  # written at its only end


@pytest.mark.parametrize(
    ("foreign_cores", "rate"),
    [
        pytest.param((0.0, 0.1, 1.0), 2.0, id="disturbed-turns-do-not-count"),
        pytest.param((1.0, 1.1, 1.2), 3.0, id="unless-there-is-no-other"),
    ],
)
def test_medians_of_turns(foreign_cores: tuple[float, ...], rate: float) -> None:
    cell = Cell(256, 1)
    turns = [
        versus.Turn("a", cell, number, some(one), (), cores)
        for number, (one, cores) in enumerate(zip((1.0, 3.0, 9.0), foreign_cores, strict=True))
    ]
    assert versus.turn_medians(turns, ["a"], [cell], 0.2)["a", cell].output_tokens_per_s == rate
    assert versus.least_disturbed(turns) == {("a", cell): min(foreign_cores)}


def test_a_cell_with_a_bad_turn_has_no_medians() -> None:
    cell = Cell(256, 1)
    turns = [
        versus.Turn("a", cell, 0, some(1.0), (), 0.0),
        versus.Turn("a", cell, 1, None, (), 0.0, "request 0: timeout"),
    ]
    assert versus.turn_medians(turns, ["a"], [cell], 0.2) == {}


def test_wrong_lengths_are_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--idle-cores", "2", "--concurrency", "1", "--rounds", "1")
    liar = f"c={sys.executable} {SERVER} {{model}} {{port}} 1"
    assert versus.main(options(tmp_path, *more, "--system", liar)) == 1
    assert "c, 32 tokens x1: request 0 had 33 prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--rounds", "0"), id="no-round"),
        pytest.param(("--model-size", "9t"), id="unknown-size"),
        pytest.param(("--compare", "a"), id="half-a-pair"),
    ],
)
def test_wrong_flags_end_with_one_line(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        versus.main(["--system", "a=http://h:1", *words])
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_system_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert versus.main(["--system", "nobody", "--models", str(tmp_path)]) == 2
    assert "nobody" in capsys.readouterr().err
