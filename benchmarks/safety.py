"""What it costs never to serve a wrong token: `python -m benchmarks.safety`.

One P and one D in this process, over real NIXL. The safety machinery is switched off and on in
turns, in the same run, by patches that exist only here: a server has no such switch. Off means no
bump of generations, no reading and comparing of words, no prompt digest, no mac, no assertion of
the ledger after each step.

Blocks of equal work come in pairs, off-on and on-off in turns, so that what else the machine does
hits both alike; a pair gives one difference, and the median of them is the result. Because such
differences drown in the noise of small machines, the CPU time inside the machinery is measured as
well, call by call, and set against the CPU time of all.
"""

import argparse
import asyncio
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.split_pair import SplitPair, build_model, prompts, split_pair
from decode_worker.machine import HandoffMachine, PostRead
from engine.block_pool import BlockPool
from engine.generations import GenerationWords
from kv_transfer import params as transfer_params
from kv_transfer.digest import prompt_digest
from kv_transfer.flight import Flight, ReadResult


def _users(package: str, function: Callable[..., Any]) -> list[tuple[Any, str]]:
    """Where a worker's package holds a function that it imported: (module, name), to patch."""
    found = [
        (module, function.__name__)
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == package and vars(module).get(function.__name__) is function
    ]
    assert found, f"{package} does not use {function.__name__}: this benchmark is out of date"
    return found


_PARTS: dict[str, list[tuple[Any, str]]] = {  # what is measured call by call
    "generation bump": [(GenerationWords, "bump")],
    "words for the claim": [(GenerationWords, "read")],
    "words compared": [(HandoffMachine, "words")],
    "prompt digest on P": _users("prefill_worker", prompt_digest),
    "prompt digest on D": _users("decode_worker", prompt_digest),
    "mac": [(transfer_params, "_mac")],
    "ledger assertion": [(BlockPool, "verify")],
}
_WAITING = "words read, waiting"


@dataclass(frozen=True, slots=True)
class Compared:
    """Medians with the machinery on and off, and the median of the pairs' differences."""

    on: float
    off: float
    cost: float  # of `on`, in the same unit; above 0: the machinery costs that much
    quartiles: tuple[float, float]  # of the pairs' differences
    pairs: int


@dataclass(frozen=True, slots=True)
class Throughput:
    """At a number of concurrent requests. Costs are in percent of the figure with all off."""

    concurrency: int
    tokens_per_s: Compared
    cpu_us_per_token: Compared


@dataclass(frozen=True, slots=True)
class HandoffTime:
    """From Adopt to the sequence in D's engine, in milliseconds, for a computed prompt."""

    prompt_tokens: int
    ms: Compared


@dataclass(frozen=True, slots=True)
class Part:
    """CPU time inside one piece of the machinery, while a block of requests ran.

    The last one is no CPU time but waiting: from posting the read of the words to its end.
    """

    name: str
    calls_per_request: float
    us_per_call: float
    us_per_request: float


@dataclass(frozen=True, slots=True)
class Report:
    """All of a run."""

    config: dict[str, Any]
    throughput: tuple[Throughput, ...]
    handoff: tuple[HandoffTime, ...]
    parts: tuple[Part, ...]
    parts_percent: float  # of the CPU time of that block, all but the waiting together


@contextmanager
def safety_off() -> Iterator[None]:
    """No fence, digest, mac or assertion. Nothing may be in flight when it begins or ends."""
    post = HandoffMachine._post

    def post_unfenced(machine: HandoffMachine, first: int, end: int) -> Any:
        return [
            replace(action, fence=None) if isinstance(action, PostRead) else action
            for action in post(machine, first, end)
        ]

    without: dict[str, Callable[..., Any]] = {
        "generation bump": lambda words, block_ids: None,
        "words for the claim": lambda words, block_ids: (0,) * len(block_ids),
        "prompt digest on P": lambda *parts: "",
        "prompt digest on D": lambda *parts: "",
        "mac": lambda data, cluster_key, scope: "none",
        "ledger assertion": lambda pool: None,
    }
    with ExitStack() as patches:
        patches.enter_context(patch.object(HandoffMachine, "_post", post_unfenced))
        for part, instead in without.items():
            for owner, name in _PARTS[part]:
                patches.enter_context(patch.object(owner, name, instead))
        yield


@contextmanager
def measured_parts() -> Iterator[dict[str, tuple[int, float]]]:
    """Count the calls of each part and the seconds in them, of CPU but for the waiting."""
    found: dict[str, tuple[int, float]] = dict.fromkeys(_PARTS, (0, 0.0))
    found[_WAITING] = 0, 0.0

    def add(name: str, spent_s: float) -> None:
        calls, seconds = found[name]
        found[name] = calls + 1, seconds + spent_s

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.thread_time()
            result = function(*args)
            add(name, time.thread_time() - began)
            return result

        return call

    followed = Flight._followed

    def words_read(flight: Flight, result: ReadResult) -> None:
        add(_WAITING, result.seconds)
        followed(flight, result)

    with ExitStack() as patches:
        patches.enter_context(patch.object(Flight, "_followed", words_read))
        for name, places in _PARTS.items():
            for owner, attribute in places:
                function = getattr(owner, attribute)
                patches.enter_context(patch.object(owner, attribute, counted(name, function)))
        yield found


async def in_pairs(
    count: int, measure: Callable[[], Awaitable[dict[str, float]]]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """What `measure` gives with all on and with all off, `count` times each, in turns."""
    on: list[dict[str, float]] = []
    off: list[dict[str, float]] = []
    for pair in range(count):
        for switched_off in (True, False) if pair % 2 else (False, True):
            if switched_off:
                with safety_off():
                    off.append(await measure())
            else:
                on.append(await measure())
    return on, off


def compare(
    on: list[dict[str, float]], off: list[dict[str, float]], name: str, cost: Callable[..., float]
) -> Compared:
    """Of one figure; `cost(on, off)` is a pair's difference."""
    with_it, without = [row[name] for row in on], [row[name] for row in off]
    costs = [cost(a, b) for a, b in zip(with_it, without, strict=True)]
    quartiles = statistics.quantiles(costs, n=4) if len(costs) > 1 else [costs[0]] * 3
    return Compared(
        statistics.median(with_it),
        statistics.median(without),
        statistics.median(costs),
        (quartiles[0], quartiles[2]),
        len(costs),
    )


class Bench:
    """A pair of workers and what is asked of it."""

    def __init__(self, pair: SplitPair, vocab_size: int, options: argparse.Namespace) -> None:
        self._pair = pair
        self._vocab_size = vocab_size
        self._options = options
        self._draw = random.Random(options.seed)

    async def report(self) -> Report:
        """Measure all, the parts last."""
        options = self._options
        for concurrency in options.concurrency:  # until all is allocated and connected
            await self._block(concurrency)
        throughput = [await self._throughput(concurrency) for concurrency in options.concurrency]
        handoff = [await self._handoff(length) for length in options.prompts]
        parts, percent = await self._parts(options.concurrency[0])
        config = {
            "model": str(options.model) if options.model else "random, 4 layers of 256",
            "prompt_tokens": options.prompt_tokens,
            "output_tokens": options.output_tokens,
            "requests_per_block": [n * options.rounds for n in options.concurrency],
            "seed": options.seed,
            "python": platform.python_version(),
            "machine": platform.machine(),
        }
        return Report(config, tuple(throughput), tuple(handoff), parts, percent)

    async def _block(self, concurrency: int) -> dict[str, float]:
        """`rounds` requests one after the other, `concurrency` times at once."""
        options = self._options

        async def client() -> int:
            total = 0
            for _ in range(options.rounds):
                prompt = prompts(self._draw, self._vocab_size, options.prompt_tokens)
                total += await self._pair.generate(prompt, options.output_tokens)
            return total

        began, cpu_began = time.perf_counter(), time.process_time()
        tokens = sum(await asyncio.gather(*(client() for _ in range(concurrency))))
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        return {"tokens_per_s": tokens / wall_s, "cpu_us": cpu_s / tokens * 1e6, "cpu_s": cpu_s}

    async def _throughput(self, concurrency: int) -> Throughput:
        _say(f"throughput at {concurrency} requests")
        on, off = await in_pairs(self._options.pairs, lambda: self._block(concurrency))
        return Throughput(
            concurrency,
            compare(on, off, "tokens_per_s", lambda a, b: (b - a) / b * 100),
            compare(on, off, "cpu_us", lambda a, b: (a - b) / b * 100),
        )

    async def _handoff(self, length: int) -> HandoffTime:
        _say(f"handoff of {length} tokens")

        async def one() -> dict[str, float]:
            prompt = prompts(self._draw, self._vocab_size, length)
            return {"ms": await self._pair.handoff_s(prompt) * 1e3}

        await one()
        on, off = await in_pairs(self._options.handoffs, one)
        return HandoffTime(length, compare(on, off, "ms", lambda a, b: a - b))

    async def _parts(self, concurrency: int) -> tuple[tuple[Part, ...], float]:
        _say("time in each part")
        requests = concurrency * self._options.rounds
        with measured_parts() as found:
            block = await self._block(concurrency)
        parts = tuple(
            Part(name, calls / requests, seconds / max(calls, 1) * 1e6, seconds / requests * 1e6)
            for name, (calls, seconds) in found.items()
        )
        spent_s = sum(seconds for name, (_, seconds) in found.items() if name != _WAITING)
        return parts, spent_s / block["cpu_s"] * 100


def as_text(report: Report) -> str:
    """The report as a person reads it."""
    rows = [f"{'':38}{'on':>10}{'off':>10}{'cost':>10}   quartiles"]
    for one in report.throughput:
        rows.append(_row(f"tokens/s at {one.concurrency} requests", one.tokens_per_s, " %", 1))
        rows.append(
            _row(f"CPU us a token at {one.concurrency} requests", one.cpu_us_per_token, " %", 1)
        )
    rows += [
        _row(f"handoff of {one.prompt_tokens} tokens, ms", one.ms, " ms", 3)
        for one in report.handoff
    ]
    rows += ["", f"{'inside, per request':38}{'calls':>10}{'us each':>10}{'us':>10}"]
    rows += [
        f"{part.name:38}{part.calls_per_request:>10.1f}{part.us_per_call:>10.1f}"
        f"{part.us_per_request:>10.1f}"
        for part in report.parts
    ]
    return "\n".join([*rows, f"all but the waiting: {report.parts_percent:.2f} % of the CPU time"])


def _row(name: str, compared: Compared, unit: str, digits: int) -> str:
    low, high = compared.quartiles
    return (
        f"{name:38}{compared.on:>10.{digits}f}{compared.off:>10.{digits}f}"
        f"{compared.cost:>+8.2f}{unit}   {low:+.2f} to {high:+.2f}{unit}, {compared.pairs} pairs"
    )


def _say(text: str) -> None:
    print(f"measuring: {text}", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.safety",
        description="The cost of fence, digest, mac and ledger assertion: on against off.",
    )
    add = parser.add_argument
    add("--model", type=Path, help="model folder (default: a small random model)")
    add("--concurrency", type=_counts, default=[8, 32], help="requests at once (default: 8,32)")
    add("--prompts", type=_counts, default=[256, 2048], help="tokens handed over (256,2048)")
    add("--pairs", type=int, default=12, help="throughput blocks on and off (default: 12)")
    add("--rounds", type=int, default=3, help="requests of a client in a block (default: 3)")
    add("--handoffs", type=int, default=40, help="handoffs on and off (default: 40)")
    add("--prompt-tokens", type=int, default=256, help="of the throughput load (default: 256)")
    add("--output-tokens", type=int, default=64, help="of the throughput load (default: 64)")
    add("--seed", type=int, default=0, help="of the prompts (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write the report there instead of printing it")
    return parser


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


async def measure(options: argparse.Namespace) -> Report:
    """Start the workers, measure, stop them."""
    with tempfile.TemporaryDirectory() as built:
        if options.model is None:
            folder, vocab_size = Path(built), build_model(Path(built))
        else:
            config = json.loads((options.model / "config.json").read_text())
            folder, vocab_size = options.model, int(config["vocab_size"])
        # Long leases: on a busy machine it would be recomputes that are measured.
        async with split_pair(folder, lease_ms=30_000, read_timeout_ms=60_000) as pair:
            return await Bench(pair, vocab_size, options).report()


def main(argv: list[str]) -> None:
    """Print the table and, unless `--json` takes it, the report as one line of JSON."""
    options = parser().parse_args(argv)
    report = asyncio.run(measure(options))
    print(as_text(report))
    text = json.dumps(asdict(report))
    if options.json is None:
        print(text)
    else:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
