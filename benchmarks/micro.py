"""The engine piece by piece, beside what the machine can do at best: `baton bench micro`.

In this process, without router, wire or engine thread: real Scheduler, ModelComputer and sampler on
a model folder, a roofline measured with the same threads, and reads over NIXL from a second
process. With `--profile`, where a step's time goes instead.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from benchmarks import micro_text as text
from benchmarks.micro_clock import Effort
from benchmarks.micro_engine import DoesNotFit, MicroEngine, open_engine
from benchmarks.micro_linear import LinearFigures, linear_figures
from benchmarks.micro_machine import Machine, measure_machine
from benchmarks.micro_parts import linear_modules
from benchmarks.micro_profile import Profile, decode_profile, prefill_profile
from benchmarks.micro_sampler import KINDS, SamplerFigures, sampler_figures
from benchmarks.micro_scheduler import SchedulerFigures, scheduler_figures
from benchmarks.micro_steps import (
    StepFigures,
    decode_figures,
    decode_steps,
    prefill_figures,
)
from benchmarks.micro_transfer import SIZES, NoTransfer, TransferFigures, transfer_figures
from benchmarks.split_pair import build_model
from contracts.errors import ConfigurationError, ServingError

PARTS = ("decode", "prefill", "linear", "sampler", "scheduler", "transfer")
_WRONG = 2  # exit status: a setting is wrong
_FAILED = 1
_SCHEDULER_CONTEXT = 512  # tokens
_BUSY = 1.0  # load average; threads that wait for each other are slow beside others
_LINEAR_TOKENS = 256  # of a prefill chunk, beside the batches of decodes
_T = TypeVar("_T")


@dataclass(slots=True)
class Report:
    """All of a run. `skipped` says what was not measured and why."""

    config: dict[str, Any]
    machine: Machine
    decode: list[StepFigures] = field(default_factory=list[StepFigures])
    prefill: list[StepFigures] = field(default_factory=list[StepFigures])
    linear: list[LinearFigures] = field(default_factory=list[LinearFigures])
    sampler: list[SamplerFigures] = field(default_factory=list[SamplerFigures])
    scheduler: list[SchedulerFigures] = field(default_factory=list[SchedulerFigures])
    transfer: list[TransferFigures] = field(default_factory=list[TransferFigures])
    profile: list[Profile] = field(default_factory=list[Profile])
    skipped: list[str] = field(default_factory=list[str])

    def as_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    def as_text(self) -> str:
        """Tables."""
        config = self.config
        busy = config["load_average"]
        pieces = [
            f"{config['model']}: {config['linear_weights'] / 1e6:.1f} M weights in linear layers, "
            f"attention {config['attention']}\n" + text.machine_text(self.machine),
            f"The machine was busy before this began (load {busy:.1f}): do not trust the figures."
            if busy > _BUSY
            else "",
            text.steps_text("decode", self.decode) if self.decode else "",
            text.steps_text("prefill", self.prefill) if self.prefill else "",
            text.linear_text(self.linear) if self.linear else "",
            text.sampler_text(self.sampler) if self.sampler else "",
            text.scheduler_text(self.scheduler) if self.scheduler else "",
            text.transfer_text(self.transfer) if self.transfer else "",
            text.profile_text(self.profile) if self.profile else "",
            "\n".join(f"skipped: {reason}" for reason in self.skipped),
        ]
        return "\n\n".join(piece for piece in pieces if piece)


class Bench:
    """An engine, the machine's limits, and what is to be measured."""

    def __init__(self, options: argparse.Namespace, engine: MicroEngine) -> None:
        self._options = options
        self._engine = engine
        self._effort = Effort(options.repeats, options.cell_seconds)
        _say("the machine")
        busy = os.getloadavg()[0]
        model = engine.parts.model
        machine = measure_machine(model.device, model.dtype, self._effort, quick=options.quick)
        config = {
            "model": str(options.model) if options.model else "random, 4 layers of 256",
            "linear_weights": engine.weights.elements,
            "weight_bytes": engine.weights.elements * model.dtype.itemsize,
            "kv_bytes_per_token": engine.kv_bytes_per_token,
            "load_average": busy,  # before, of the last minute
            "attention": engine.parts.backend_name,
            "repeats": options.repeats,
            "cell_seconds": options.cell_seconds,
            "seed": options.seed,
        }
        self.report = Report(config, machine)

    def run(self) -> Report:
        """Measure all that is wanted."""
        options, engine, effort, report = self._options, self._engine, self._effort, self.report
        if options.profile:
            report.profile += self._cells(
                lambda batch, context: decode_profile(engine, batch, context, effort),
                lambda length: prefill_profile(engine, length, effort),
            )
            return report
        wanted, machine = options.only, report.machine
        if "decode" in wanted:
            report.decode += self._cells(
                lambda batch, context: decode_figures(engine, machine, batch, context, effort)
            )
        if "prefill" in wanted:
            report.prefill += self._cells(
                None, lambda length: prefill_figures(engine, machine, length, effort)
            )
        if "linear" in wanted:
            report.linear += self._linear()
        if "sampler" in wanted:
            _say("the sampler")
            vocab_size, device = engine.parts.model.vocab_size, engine.device
            report.sampler += [
                sampler_figures(kind, batch, vocab_size, device, effort, options.seed)
                for kind in KINDS
                for batch in options.batches
            ]
        if "scheduler" in wanted:
            _say("the scheduler")
            report.scheduler += [
                scheduler_figures(running, _SCHEDULER_CONTEXT, effort, options.seed)
                for running in options.running
            ]
        if "transfer" in wanted:
            self._transfer()
        return report

    def _cells(
        self,
        decode: Callable[[int, int], _T] | None = None,
        prefill: Callable[[int], _T] | None = None,
    ) -> Iterable[_T]:
        options = self._options
        cells: list[tuple[str, Callable[[], _T]]] = []
        if decode is not None:
            cells += [
                (f"decode, batch {batch}, context {context}", _later(decode, batch, context))
                for context in options.contexts
                for batch in options.batches
            ]
        if prefill is not None:
            cells += [
                (f"prefill of {length} tokens", _later(prefill, length))
                for length in options.prompts
            ]
        for name, measure in cells:
            _say(name)
            try:
                yield measure()
            except DoesNotFit as error:
                self.report.skipped.append(f"{name}: {error}")

    def _linear(self) -> Iterable[LinearFigures]:
        model = self._engine.parts.model
        modules = linear_modules(model.module)
        for shape in self._engine.weights.shapes:
            _say(f"linear layers of {shape.outputs} x {shape.inputs}")
            for tokens in sorted({*self._options.batches, _LINEAR_TOKENS}):
                yield linear_figures(
                    shape,
                    modules,
                    tokens,
                    self.report.machine,
                    model.device,
                    model.dtype,
                    self._effort,
                )

    def _transfer(self) -> None:
        _say("KV transfer")
        sizes = SIZES[:3] if self._options.quick else SIZES
        try:
            self.report.transfer += transfer_figures(sizes, self.report.machine, self._effort)
        except NoTransfer as error:
            self.report.skipped.append(f"KV transfer: {error}")


def _later(function: Callable[..., _T], *args: int) -> Callable[[], _T]:
    return lambda: function(*args)


def _say(what: str) -> None:
    print(f"measuring: {what}", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(_WRONG, f"{self.prog}: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="baton bench micro",
        description="Step time, attention, linear layers, sampler, scheduler and KV transfer of "
        "one engine in this process, beside the measured limits of the machine.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="model folder (default: a small random model)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--threads", type=_count, metavar="N", help="torch's threads (default: torch's choice)")
    add("--batches", type=_counts, default=[1, 8, 16, 64], help="decodes (default: 1,8,16,64)")
    add("--contexts", type=_counts, default=[128, 1500], help="tokens (default: 128,1500)")
    add("--prompts", type=_counts, default=[128, 512, 1500], help="prefills (128,512,1500)")
    add("--running", type=_counts, default=[1, 64, 256], help="for the scheduler (1,64,256)")
    add("--only", type=_parts, default=PARTS, metavar="PART,...", help=f"of {', '.join(PARTS)}")
    add("--repeats", type=_count, default=25, metavar="N", help="of each (default: 25)")
    add("--cell-seconds", type=float, default=3.0, metavar="S", help="at most, for the repeats of"
        " one figure; three are made in any case (default: 3)")  # fmt: skip
    add("--quick", action="store_true", help="few small figures, to see that it works")
    add("--profile", action="store_true", help="where a step's time goes, by torch's profiler")
    add("--seed", type=int, default=0, help="of prompts and draws (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


_QUICK = {
    "batches": [1, 4],
    "contexts": [32],
    "prompts": [48],
    "running": [1, 16],
    "repeats": 4,
    "cell_seconds": 0.5,
}


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """What the command line says; with `--quick`, other defaults. Exits if it is wrong."""
    command_line = parser()
    if "--quick" in argv:
        command_line.set_defaults(**_QUICK)
    return command_line.parse_args(argv)


def _count(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is no number above 0")
    return int(value)


def _counts(value: str) -> list[int]:
    return [_count(part) for part in value.split(",")]


def _parts(value: str) -> tuple[str, ...]:
    found = tuple(value.split(","))
    for part in found:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(PARTS)}")
    return found


def _sizes(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Sequences, and the tokens of each, that the cache is to hold at once."""
    grown = max(options.contexts) + decode_steps(options.repeats)
    return [(max(options.batches), grown), *((1, length) for length in options.prompts)]


def measure(options: argparse.Namespace) -> Report:
    """Build the engine and measure.

    Raises:
        ConfigurationError: model or device cannot be used.
        UnsupportedModel: likewise.
    """
    if options.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"there is no {options.device} here")
    with tempfile.TemporaryDirectory() as built:
        if options.model is None:
            build_model(Path(built))
        _say("(loading the model)")
        engine = open_engine(
            options.model or Path(built),
            device=options.device,
            dtype=options.dtype,
            threads=options.threads,
            sizes=_sizes(options),
            seed=options.seed,
        )
        return Bench(options, engine).run()


def main(argv: Sequence[str]) -> int:
    """Print the tables; its exit status: 0, 1 failed, 2 a setting is wrong."""
    options = read_options(argv)
    try:
        report = measure(options)
    except ConfigurationError as error:
        print(f"baton bench micro: error: {error}", file=sys.stderr)
        return _WRONG
    except (ServingError, OSError) as error:
        print(f"baton bench micro: error: {type(error).__name__}: {error}", file=sys.stderr)
        return _FAILED
    print(report.as_text())
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(report.as_json() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
