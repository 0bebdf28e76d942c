"""`baton bench load`: one open-loop run against an OpenAI-compatible server."""

import argparse
import asyncio
import dataclasses
import json
import platform
import secrets
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import uvloop

from benchmarks.client import ChatClient, ServerError
from benchmarks.metrics import Limits, RequestRecord
from benchmarks.open_loop import OpenLoop
from benchmarks.report import as_text, progress_line
from benchmarks.schedule import WORDS, PromptScale, TokenRange, Workload
from benchmarks.summary import Summary, reasons_against, summarise

SCHEMA = 1
VALID, INVALID, CANNOT_RUN, INTERRUPTED = 0, 1, 2, 130
LEAD_S = 0.1  # between the decision to start and the first deadline


@dataclass(frozen=True, slots=True)
class Outcome:
    """All of a run. Every figure of `summary` can be recomputed from `records`."""

    config: dict[str, Any]
    records: tuple[RequestRecord, ...]
    window_s: float
    completed: bool
    summary: Summary
    reasons: tuple[str, ...]  # against believing it; empty for a valid run

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "schema": SCHEMA,
            "config": self.config,
            "valid": not self.reasons,
            "reasons": list(self.reasons),
            "completed": self.completed,
            "window_s": self.window_s,
            "summary": dataclasses.asdict(self.summary),
            "requests": [dataclasses.asdict(record) for record in self.records],
        }


def main(argv: list[str]) -> int:
    """Run the command; its exit status: 0 valid, 1 invalid, 2 could not run, 130 interrupted."""
    options = parser().parse_args(argv)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            outcome = runner.run(measure(options, sys.stderr))
    except ServerError as error:
        print(f"baton bench load: {error}", file=sys.stderr)
        return CANNOT_RUN
    print(as_text(outcome.config, outcome.summary, outcome.reasons))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(outcome.to_json()) + "\n", encoding="utf-8")
        print(f"Written to {options.json}")
    if not outcome.completed:
        return INTERRUPTED
    return INVALID if outcome.reasons else VALID


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="baton bench load",
        description="Open-loop load with Poisson arrivals. Latencies count from the intended "
        "arrival, so a client or server that falls behind cannot hide it.",
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="server (default: %(default)s)")
    add("--model", help="served name (default: the first one the server lists)")
    add("--api-key", help="sent as a bearer token")
    add("--rate", type=_positive, default=2.0, help="requests per second (default: %(default)s)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--duration", type=_positive, metavar="S", help="measured window in seconds (default: 20)"
    )
    length.add_argument("--requests", type=_count, metavar="N", help="or: measured requests")
    add("--warmup", type=_not_negative, default=3.0, metavar="S",
        help="seconds of the same load before the window (default: %(default)s)")  # fmt: skip
    add("--concurrency-cap", type=_count, metavar="N",
        help="never more than N requests at once; the wait counts as latency")  # fmt: skip
    add("--prompt-tokens", type=TokenRange.parse, default=TokenRange(256, 256), metavar="N[-M]",
        help="per request, uniformly drawn from the range (default: 256)")  # fmt: skip
    add("--output-tokens", type=TokenRange.parse, default=TokenRange(64, 64), metavar="N[-M]",
        help="per request; end tokens are ignored (default: 64)")  # fmt: skip
    add("--shared-prefix-tokens", type=_count, default=0, metavar="N",
        help="of each prompt, the same in all of them (default: none)")  # fmt: skip
    add("--slo-ttft-ms", type=_positive, metavar="MS", help="limit of time to first token")
    add("--slo-tpot-ms", type=_positive, metavar="MS", help="limit of time per output token")
    add("--slo-e2e-ms", type=_positive, metavar="MS", help="limit of the whole request")
    add("--timeout", type=_positive, default=600.0, metavar="S",
        help="a request is given up after that (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of arrivals, lengths and prompts (default: 0)")
    add("--salt", help="of the prompts (default: random, so that no run meets another's cache)")
    add("--json", type=Path, metavar="FILE", help="write everything there, raw stamps included")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def limits_of(options: argparse.Namespace) -> Limits | None:
    """The limits asked for, in seconds; None if none was."""
    in_ms = (options.slo_ttft_ms, options.slo_tpot_ms, options.slo_e2e_ms)
    if in_ms == (None, None, None):
        return None
    return Limits(*(None if limit is None else limit / 1e3 for limit in in_ms))


async def measure(options: argparse.Namespace, screen: TextIO) -> Outcome:
    """Ask the server how it counts, run the load, and summarise.

    Raises:
        ServerError: the server is not there or refuses the probe.
    """
    async with ChatClient(
        options.url, api_key=options.api_key, timeout_s=options.timeout
    ) as client:
        model = options.model or (await client.models())[0]
        salt = options.salt or secrets.token_hex(8)
        workload = Workload(
            model=model,
            rate_per_s=options.rate,
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
            seed=options.seed,
            salt=salt,
            scale=await _probe(client, model),
            warmup_s=options.warmup,
            duration_s=None if options.requests else options.duration or 20.0,
            num_requests=options.requests,
            shared_prefix_tokens=options.shared_prefix_tokens,
        )
        window_s = workload.window_s()
        loop = OpenLoop(client.stream, time.perf_counter, max_in_flight=options.concurrency_cap)
        stop = asyncio.Event()
        running_loop = asyncio.get_running_loop()
        running_loop.add_signal_handler(signal.SIGINT, stop.set)
        origin = time.perf_counter() + options.warmup + LEAD_S
        progress = asyncio.create_task(_show_progress(loop, window_s, origin, screen))
        try:
            completed = await loop.run(workload.requests(), origin, stop)
        finally:
            running_loop.remove_signal_handler(signal.SIGINT)
            progress.cancel()
            await asyncio.wait([progress])
    if not completed:
        window_s = min(window_s, max(time.perf_counter() - origin, 1e-3))
    records = tuple(loop.records())
    limits = limits_of(options)
    reasons = reasons_against(records, window_s, limits)
    return Outcome(
        config=_config(options, workload),
        records=records,
        window_s=window_s,
        completed=completed,
        summary=summarise(records, window_s, limits),
        reasons=reasons if completed else ("interrupted", *reasons),
    )


async def _probe(client: ChatClient, model: str) -> PromptScale:
    """From one word, and from every word once: then the mean tokens per word are exact."""
    few, many = [
        (len(words), await client.prompt_tokens(model, " ".join(words)))
        for words in (WORDS[:1], WORDS)
    ]
    return PromptScale.from_probes(few, many)


def _config(options: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    return {
        "url": options.url,
        "concurrency_cap": options.concurrency_cap,
        "timeout_s": options.timeout,
        "limits": None if (limits := limits_of(options)) is None else dataclasses.asdict(limits),
        "workload": dataclasses.asdict(workload),
        "client": {"python": platform.python_version(), "system": platform.platform()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


async def _show_progress(loop: OpenLoop, window_s: float, origin: float, screen: TextIO) -> None:
    """One line that rewrites itself on a terminal; a line every five seconds elsewhere."""
    live = screen.isatty()
    try:
        while True:
            await asyncio.sleep(0.25 if live else 5.0)
            line = progress_line(
                loop.recordings, loop.in_flight, time.perf_counter() - origin, window_s
            )
            screen.write(f"\r\x1b[K{line}" if live else f"{line}\n")
            screen.flush()
    finally:
        if live:
            screen.write("\r\x1b[K")
            screen.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
