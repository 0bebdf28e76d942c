"""A seeded fault campaign: python -m tests.faults.campaign --runs 10000 --seed 1

Each run is random traffic, one fault at a random point, and checks. Exit status 1 if one fails.
"""

import argparse
import asyncio
import os
import platform
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults.campaign import zygote
from tests.faults.campaign.answers import differences
from tests.faults.campaign.channel import Control
from tests.faults.campaign.cluster import Settings
from tests.faults.campaign.model import ensure_model
from tests.faults.campaign.report import Report
from tests.faults.campaign.run import Outcome
from tests.faults.campaign.runner import FAULTS, Part, default_folder

SILENT_S = 240.0  # of a runner: it hangs


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="index of the first run")
    parser.add_argument("--only", type=int, help="replay the run of this index")
    parser.add_argument("--fault", choices=sorted(FAULTS), default="", help="only this one")
    parser.add_argument("--clusters", type=int, default=2)
    parser.add_argument("--pool", type=int, default=150, help="different requests")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    parser.add_argument("--logs", type=Path, help="keep failing clusters' logs there")
    parser.add_argument("--stop-after", type=int, default=20, help="failing runs; 0: never")
    parser.add_argument("--no-fence", action="store_true", help="a deliberate bug, to be found")
    return parser.parse_args()


class Campaign:
    """Starts the runners and gathers what they tell."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._answers: Any = None
        self._failing = 0
        self._left: set[int] = set()
        self._stop = asyncio.Event()
        self._heard_at: dict[int, float] = {}
        machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
        self.report = Report(options.seed, options.clusters, machine)

    async def run(self) -> None:
        """All of it."""
        options = self._options
        indices = range(options.first, options.first + options.runs)
        if options.only is not None:
            indices = range(options.only, options.only + 1)
        clusters = min(options.clusters, len(indices))
        model = await asyncio.to_thread(ensure_model, self._folder)
        process, path = await asyncio.to_thread(zygote.start, self._folder)
        began = time.monotonic()
        controls: list[Control] = []
        for end in (signal.SIGINT, signal.SIGTERM):  # the report is of what was done
            asyncio.get_running_loop().add_signal_handler(end, self._stop.set)
        try:
            for number in range(clusters):
                settings = Settings(
                    number,
                    path,
                    model,
                    default_folder(self._folder, number),
                    transport="tcp" if number % 2 else "",
                )
                part = Part(
                    options.seed,
                    tuple(indices[number::clusters]),
                    options.fault,
                    options.no_fence,
                    check_reference=number == 0,
                    pool=options.pool,
                )
                controls.append(await self._start(settings, part))
            await self._until_end()
        finally:
            self._left.clear()  # who ends from here on was told to
            for control in controls:
                control.close()
            await asyncio.sleep(0.5)  # the runners end their clusters
            process.kill()  # and whatever is left ends with it
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self.report.seconds = time.monotonic() - began

    async def _start(self, settings: Settings, part: Part) -> Control:
        number = settings.number

        def heard(kind: str, value: Any) -> None:
            self._heard_at[number] = time.monotonic()
            if kind == "outcome":
                self._outcome(value)
            elif kind == "expected":
                self._compare(value)
            else:
                self._end(number, value)

        self._left.add(number)
        self._heard_at[number] = time.monotonic()
        _, sock = await asyncio.to_thread(_fork, settings, part)
        control = Control(heard, lambda: self._end(number, "it died"))
        await control.attach(sock)
        return control

    def _outcome(self, outcome: Outcome) -> None:
        self.report.add(outcome)
        for failure in outcome.failures:
            print(
                f"FAILED seed {self._options.seed} index {outcome.index} ({outcome.fault}):"
                f" {failure}",
                flush=True,
            )
        if outcome.failures:
            self._failing += 1
            if self._failing == self._options.stop_after:
                self._stop.set()
        if self.report.runs % 500 == 0:
            print(f"{self.report.runs} runs, {self._failing} failed", flush=True)

    def _compare(self, expected: Any) -> None:
        """All clusters must give the same answers."""
        if self._answers is None:
            self._answers = expected
        elif difference := differences(self._answers, expected):
            self._fail(f"two clusters' undisturbed answers differ: {difference}")

    def _end(self, number: int, problem: str) -> None:
        if number in self._left:
            self._left.discard(number)
            if problem:
                self._fail(f"cluster {number}: {problem} (logs: {self._folder})")
        if not self._left:
            self._stop.set()

    def _fail(self, text: str) -> None:
        print(f"FAILED {text}", flush=True)
        self.report.failures.append(text)

    async def _until_end(self) -> None:
        while not self._stop.is_set():
            try:
                await asyncio.wait_for(self._stop.wait(), 5.0)
            except TimeoutError:
                for number in list(self._left):
                    if time.monotonic() - self._heard_at[number] > SILENT_S:
                        self._end(number, f"nothing heard for {SILENT_S:g} s")


def _fork(settings: Settings, part: Part) -> tuple[int, socket.socket]:
    name = "tests.faults.campaign.runner:runner"
    return zygote.fork(settings.zygote, name, settings, part)


def main() -> int:
    """0 if nothing failed."""
    options = _arguments()
    folder = options.logs or Path(tempfile.mkdtemp(prefix="baton-faults-"))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(options, folder)
    asyncio.run(campaign.run())
    report = campaign.report
    if options.json:
        options.json.write_text(report.as_json())
    if options.markdown:
        options.markdown.write_text(report.as_markdown())
    print(report.as_markdown(), flush=True)
    if report.failures:
        print(
            f"logs: {folder}; replay: python -m tests.faults.campaign"
            f" --seed {options.seed} --only INDEX",
            flush=True,
        )
        return 1
    if options.logs is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if report.runs else 1


if __name__ == "__main__":
    sys.exit(main())
