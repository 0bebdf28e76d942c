"""Hours of mixed traffic on real processes: `python -m tests.soak --duration 2h`, or `make soak`.

Ctrl-C ends a run early and well: what was measured is kept and judged (a second one: at once). The
exit code is 0 if nothing failed and nothing grew.
"""

import argparse
import asyncio
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from cluster.demo_model import ensure_demo_model
from tests.soak.drive import Settings, Soak
from tests.soak.processes import Cluster, NotStarted, cluster
from tests.soak.record import Record, SampleFile
from tests.soak.report import judge, passed, table, write

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")
WORKER_FLAGS = ("--kv-memory", "16MiB")  # small, so that caches overflow
ROUTER_FLAGS = (
    *("--served-model-name", "demo", "--max-model-len", "1024"),
    *("--reasoning-parser", "none", "--enable-kv-transfer-params"),
)


def seconds(text: str) -> float:
    """A duration: 2h, 1h30m, 90s, 45.

    Raises:
        ValueError: it is none, or not positive.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    parts = match.groups() if match else ()
    found = sum(
        float(part) * unit for part, unit in zip(parts, (3600.0, 60.0, 1.0), strict=False) if part
    )
    if found <= 0:
        raise ValueError(f"{text!r} is no duration; write 2h, 90m or 30s")
    return found


def run(settings: Settings, to: Path, model: Path) -> tuple[Record, float]:
    """The whole run; logs and samples go to a folder. Returns the record and how long it took.

    Raises:
        NotStarted: the processes did not start.
    """
    with (
        cluster(model, to / "logs", worker=WORKER_FLAGS, router=ROUTER_FLAGS) as processes,
        closing(SampleFile(to / "samples.csv")) as file,
    ):
        record, elapsed_s = asyncio.run(_drive(processes, settings, file))
        for one in reversed(processes.started):  # the router first: it has streams to end
            if wrong := one.end():
                record.tally.fail(f"end: {one.name}: {wrong}")
        for one in processes.started:
            for trouble in one.troubles():
                record.tally.fail(f"logged: {one.name}: {trouble}")
    return record, elapsed_s


async def _drive(processes: Cluster, settings: Settings, file: SampleFile) -> tuple[Record, float]:
    soak = Soak(processes, settings, file)
    running = asyncio.create_task(soak.run(), name="soak")

    def interrupted() -> None:
        """The first time all ends well, the second time at once."""
        if soak.stopped:
            running.cancel()
        soak.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    try:
        await asyncio.wait({running})
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    if running.cancelled():
        soak.record.tally.fail("interrupted: twice, so nobody waited for the end")
    else:
        running.result()
    return soak.record, soak.elapsed_s


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write, print. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--duration", type=seconds, default=seconds("2h"), help="2h, 90m, 30s")
    parser.add_argument("--out", type=Path, help="folder for results (default: build/soak/TIME)")
    parser.add_argument("--seed", type=int, default=1, help="of the traffic")
    parser.add_argument("--clients", type=int, default=6, help="requests at once, at most")
    parser.add_argument("--rate", type=float, help="requests a second, at most (default: no limit)")
    parser.add_argument(
        "--period", type=seconds, default=90.0, help="from idle point to idle point"
    )
    args = parser.parse_args(argv)
    if args.clients < 1 or (args.rate is not None and args.rate <= 0):
        parser.error("--clients and --rate must be positive")
    to: Path = args.out or Path("build/soak") / time.strftime("%Y%m%d-%H%M%S")
    to.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        args.duration, args.seed, args.clients, args.rate, min(args.period, args.duration / 4)
    )
    with tempfile.TemporaryDirectory(prefix="baton-soak-") as folder:
        try:
            record, elapsed_s = run(settings, to, ensure_demo_model(Path(folder) / "demo"))
        except NotStarted as error:
            print(error, file=sys.stderr)
            return 1
    findings = judge(record)
    write(record, findings, asdict(settings), elapsed_s, to)
    print(f"\n{table(record, findings, elapsed_s)}\nresults: {to}")
    return 0 if passed(record, findings) else 1


if __name__ == "__main__":
    sys.exit(main())
