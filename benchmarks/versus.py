r"""Ours beside other engines, in one run: `python -m benchmarks.versus`.

Each cell is measured in turns (A B, B A, A B, ...), never two systems at once, with the same model
folder and the same prompts in a round. Systems that keep quiet while nobody asks stay up between
their turns; one that keeps a core busy is suspended (SIGSTOP) while others are measured.

    python -m benchmarks.versus --model-size 4m --system baton-aggregated \
        --system vllm-aggregated --vllm-bin VENV/bin --rounds 3 --json versus.json
"""

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks.client import ChatClient, ServerError
from benchmarks.metrics import RequestRecord
from benchmarks.peers.process import Running, System, SystemFailed
from benchmarks.peers.systems import Setup, UnknownSystem, make_system
from benchmarks.versus_flags import parser
from benchmarks.versus_load import (
    BadTurn,
    Cell,
    Figures,
    closed_loop,
    figures,
    make_body,
    medians,
)
from benchmarks.versus_model import SIZES, Prompts, ensure_model
from benchmarks.versus_report import Comparison, compare, default_pairs, figures_table, ratios_table

SCHEMA = 1
MET, MISSED, CANNOT_RUN, INTERRUPTED = 0, 1, 2, 130


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One system's turn in one cell; without figures if it says nothing (`error`).

    `foreign_cores` is what processes that are neither the system's nor ours kept busy meanwhile.
    """

    system: str
    cell: Cell
    round: int
    figures: Figures | None
    records: tuple[RequestRecord, ...]
    foreign_cores: float
    error: str = ""


class Contestant:
    """One system through the whole run. `close` it, whatever happened."""

    def __init__(self, system: System, options: argparse.Namespace) -> None:
        self.system = system
        self.running = Running(system, options.logs)
        self.notes: dict[str, float] = {}
        self.stays_up = True
        self.options = options
        self._client: ChatClient | None = None
        self._model = ""

    async def ready(self, prompts: Prompts, salt: str) -> None:
        """Started and warm, or awake again.

        Raises:
            SystemFailed: it cannot be started, or has ended.
            ServerError: it answers no request.
        """
        self.running.check()
        if self._client is not None:
            return
        options = self.options
        self._client = await ChatClient(self.system.url, timeout_s=options.timeout).__aenter__()
        if self.running.started:
            await self.running.resume(options.start_timeout)
            return
        self.notes["start_s"] = await self.running.start(options.start_timeout)
        self._model = self.system.served_name or (await self._client.models())[0]
        most = max(options.concurrency)
        for size, count in ((64, most), (max(options.prompt_tokens), 1)):
            bodies = self._bodies(prompts, size, count, f"{salt} warm {size} {time.time_ns()}")
            for record in await closed_loop(self._client, bodies, most, options.output_tokens):
                if not record.ok:
                    raise ServerError(f"{self.system.name}, warming up: {record.error}")

    async def turn(self, prompts: Prompts, cell: Cell, number: int, salt: str) -> Turn:
        """Measure one cell once.

        Raises:
            SystemFailed: a process of it ended.
        """
        assert self._client is not None, "not ready"
        options = self.options
        count = max(options.min_requests, cell.concurrency * options.waves)
        # The same for all systems in a round, and different in each round.
        bodies = self._bodies(prompts, cell.prompt_tokens, count, f"{salt} {number} {cell}")
        began, before = time.monotonic(), self._foreign_s()
        records = await closed_loop(self._client, bodies, cell.concurrency, options.output_tokens)
        foreign_cores = max(0.0, self._foreign_s() - before) / (time.monotonic() - began)
        self.running.check()
        found, error = None, ""
        try:
            found = figures(
                records, prompt_tokens=cell.prompt_tokens, output_tokens=options.output_tokens
            )
        except BadTurn as bad:
            error = str(bad)
        return Turn(self.system.name, cell, number, found, tuple(records), foreign_cores, error)

    async def rest(self) -> None:
        """Its turn is over: wait until it is idle; suspend it if it never is."""
        if not self.system.parts:
            return
        options = self.options
        deadline = time.monotonic() + options.settle
        while self.stays_up:
            busy = await self.running.idle_cores(options.idle_look)
            if busy <= options.idle_cores:
                self.notes["idle_cores"] = busy
                return
            if time.monotonic() >= deadline:
                self.notes["restless_cores"] = busy
                self.stays_up = False
        await self._disconnect()  # a connection may be too old when the server wakes
        self.running.pause()

    async def close(self) -> None:
        """End its processes. Idempotent."""
        await self._disconnect()
        await self.running.stop()

    async def _disconnect(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.__aexit__()

    def _foreign_s(self) -> float:
        """CPU seconds of the machine that neither the system nor this process has used so far."""
        if not self.system.parts:
            return 0.0  # it may be anywhere
        machine, own = psutil.cpu_times(), os.times()
        busy = machine.user + machine.nice + machine.system
        return float(busy - self.running.cpu_s() - own.user - own.system)

    def _bodies(self, prompts: Prompts, tokens: int, count: int, seed: str) -> list[bytes]:
        return [
            make_body(
                self._model,
                prompts.make(tokens, f"{seed} {index}"),
                self.options.output_tokens,
                strict=self.system.strict,
            )
            for index in range(count)
        ]


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole run for one model; what `--json` holds.

    Raises:
        UnknownSystem, SystemFailed, ServerError: it cannot be measured.
    """
    shape = SIZES[options.model_size]
    folder = ensure_model(options.models / options.model_size, shape)
    prompts = Prompts(folder)
    setup = make_setup(options, folder)
    contestants = [Contestant(make_system(text, setup), options) for text in options.system]
    names = [contestant.system.name for contestant in contestants]
    cells = [Cell(size, many) for size in options.prompt_tokens for many in options.concurrency]
    salt = secrets.token_hex(8)
    turns: list[Turn] = []
    completed = False
    try:
        for contestant in contestants:
            await contestant.ready(prompts, salt)
            contestant.notes["resident_bytes"] = contestant.running.resident_bytes()
            await contestant.rest()
            _say(f"{contestant.system.name}: {_notes(contestant.notes)}")
        for cell in cells:
            for number in range(options.rounds):
                for contestant in contestants if number % 2 == 0 else reversed(contestants):
                    await contestant.ready(prompts, salt)
                    turns.append(await _quiet_turn(contestant, prompts, cell, number, salt))
                    await contestant.rest()
        completed = True
    except asyncio.CancelledError:
        _say("interrupted; what was measured so far:")
    except (SystemFailed, ServerError) as error:
        if not turns:
            raise
        _say(f"given up: {error}; what was measured so far:")
    finally:
        for contestant in contestants:
            await contestant.close()
    middle = turn_medians(turns, names, cells, options.foreign_cores)
    # Nothing is said about a cell in which one side never had the machine for itself.
    noise = least_disturbed(turns)
    quiet = {key: one for key, one in middle.items() if noise[key] <= options.foreign_cores}
    comparisons = compare(quiet, options.compare or default_pairs(names), cells)
    return {
        "schema": SCHEMA,
        "completed": completed,
        "disturbed": any(cores > options.foreign_cores for cores in noise.values()),
        "revision": revision(),
        "machine": {"cores": setup.cores, "platform": platform.platform()},
        "model": {
            "size": options.model_size,
            "parameters": shape.parameters,
            **dataclasses.asdict(shape),
        },
        "config": {key: _plain(value) for key, value in vars(options).items()},
        "systems": {
            one.system.name: {"commands": [part.command for part in one.system.parts], **one.notes}
            for one in contestants
        },
        "medians": [
            {"system": name, **dataclasses.asdict(cell), **dataclasses.asdict(one)}
            for (name, cell), one in middle.items()
        ],
        "comparisons": [dataclasses.asdict(one) for one in comparisons],
        "turns": [dataclasses.asdict(turn) for turn in turns],
        "text": _text(middle, comparisons, turns, names, cells, options.foreign_cores),
    }


async def _quiet_turn(
    contestant: Contestant, prompts: Prompts, cell: Cell, number: int, salt: str
) -> Turn:
    """The first turn that nobody disturbed; after as many as allowed, the least disturbed."""
    turns: list[Turn] = []
    for attempt in range(contestant.options.retries + 1):
        turns.append(await contestant.turn(prompts, cell, number, f"{salt} {attempt}"))
        _say(f"{contestant.system.name}, {cell}, round {number + 1}: {_result(turns[-1])}")
        if turns[-1].foreign_cores <= contestant.options.foreign_cores:
            break
    return min(turns, key=lambda turn: turn.foreign_cores)


def make_setup(options: argparse.Namespace, folder: Path) -> Setup:
    """What the command line says about the systems."""
    return Setup(
        model=folder.resolve(),
        cores=len(os.sched_getaffinity(0)),
        kv_gib=options.kv_gib,
        pd_threads=options.pd_threads,
        vllm_bin=options.vllm_bin and options.vllm_bin.absolute(),
        vllm_env=dict(options.vllm_env),
        vllm_args=tuple(options.vllm_args.split()),
        baton_worker_args=tuple(options.baton_args.split()),
        transformers_env=dict(options.transformers_env),
        transformers_args=tuple(options.transformers_args.split()),
    )


def revision() -> str:
    """The commit that was measured, and whether files differ from it."""
    with suppress(OSError, subprocess.SubprocessError):
        where = Path(__file__).parent
        words = [
            subprocess.run(
                ["git", *words], cwd=where, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        ]
        return words[0] + (" and uncommitted changes" if words[1] else "")
    return "unknown"


def turn_medians(
    turns: Sequence[Turn], names: Sequence[str], cells: Sequence[Cell], quiet_cores: float
) -> dict[tuple[str, Cell], Figures]:
    """Of each system and cell that every one of its turns can say something about.

    Turns in which other processes took more than `quiet_cores` count only where there is no other.
    """
    found = {}
    for cell in cells:
        for name in names:
            own = [turn for turn in turns if (turn.system, turn.cell) == (name, cell)]
            quiet = [turn for turn in own if turn.foreign_cores <= quiet_cores]
            valid = [turn.figures for turn in quiet or own if turn.figures is not None]
            if valid and all(turn.figures is not None for turn in own):
                found[name, cell] = medians(valid)
    return found


def least_disturbed(turns: Sequence[Turn]) -> dict[tuple[str, Cell], float]:
    """Cores that others took in the quietest turn of each system and cell."""
    least: dict[tuple[str, Cell], float] = {}
    for turn in turns:
        key = (turn.system, turn.cell)
        least[key] = min(turn.foreign_cores, least.get(key, turn.foreign_cores))
    return least


def _text(
    middle: dict[tuple[str, Cell], Figures],
    comparisons: Sequence[Comparison],
    turns: Sequence[Turn],
    names: Sequence[str],
    cells: Sequence[Cell],
    quiet_cores: float,
) -> str:
    parts = [figures_table(middle, names, cells), ratios_table(comparisons)]
    bad = [f"- {turn.system}, {turn.cell}: {turn.error}" for turn in turns if turn.error]
    disturbed = [
        f"- {name}, {cell}: {cores:.2f} cores"
        for (name, cell), cores in least_disturbed(turns).items()
        if cores > quiet_cores
    ]
    for title, lines in (
        ("Not measured", bad),
        ("Disturbed by other processes in every turn, so not compared", disturbed),
    ):
        if lines:
            parts.append("\n".join([f"{title}:", *lines]))
    return "\n\n".join(parts)


def _result(turn: Turn) -> str:
    if turn.figures is None:
        return turn.error
    one = turn.figures
    return (
        f"{one.output_tokens_per_s:.0f} tokens/s, TTFT {one.ttft_p50_s * 1e3:.0f} ms,"
        f" ITL {one.itl_p50_s * 1e3:.1f} ms, others {turn.foreign_cores:.2f} cores"
    )


def _notes(notes: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in notes.items())


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 all targets met, 1 one missed, 2 could not run, 130 interrupted."""
    options = parser().parse_args(argv)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            outcome = runner.run(_interruptible(options))
    except (UnknownSystem, SystemFailed, ServerError) as error:
        print(f"benchmarks.versus: {error}", file=sys.stderr)
        return CANNOT_RUN
    print(outcome["text"])
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(outcome) + "\n", encoding="utf-8")
    if not outcome["completed"]:
        return INTERRUPTED
    failed = outcome["disturbed"] or any(turn["error"] for turn in outcome["turns"])
    return MISSED if failed or any(one["misses"] for one in outcome["comparisons"]) else MET


async def _interruptible(options: argparse.Namespace) -> dict[str, Any]:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await measure(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
