"""The command line of `python -m benchmarks.versus`."""

import argparse
from pathlib import Path

from benchmarks.peers.systems import KNOWN
from benchmarks.versus_model import SIZES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versus",
        description="Measure engines in turns, on one model and the same prompts.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--system", action="append", required=True, metavar="NAME[=URL|=COMMAND]",
        help=f"one of {', '.join(KNOWN)}; or a name of your own with a URL, or with a command that"
        " holds {model} and {port}")  # fmt: skip
    add("--compare", action="append", type=_pair, metavar="OURS/THEIRS",
        help="which to compare (default: the pairs that have a target)")  # fmt: skip
    add("--model-size", choices=SIZES, default="4m", help="parameters (default: %(default)s)")
    add("--models", type=Path, default=Path.home() / ".cache" / "baton" / "versus", metavar="DIR",
        help="where the models are built (default: %(default)s)")  # fmt: skip
    add("--prompt-tokens", type=_counts, default=[256, 1500], metavar="N,...")
    add("--concurrency", type=_counts, default=[1, 8, 16], metavar="N,...")
    add("--output-tokens", type=_count, default=64, metavar="N")
    add("--rounds", type=_count, default=3, metavar="N", help="turns of each (default: 3)")
    add("--waves", type=_count, default=2, metavar="N",
        help="requests of a turn, in multiples of the concurrency (default: 2)")  # fmt: skip
    add("--min-requests", type=_count, default=3, metavar="N", help="of a turn (default: 3)")
    add("--kv-gib", type=_count, default=1, metavar="N", help="KV cache of a worker (default: 1)")
    add("--pd-threads", type=_count, default=1, metavar="N",
        help="threads of each of two workers on this machine (default: 1)")  # fmt: skip
    add("--vllm-bin", type=Path, metavar="DIR", help="bin folder of vLLM's virtual environment")
    add("--vllm-env", type=_assignment, action="append", default=[], metavar="NAME=VALUE")
    add("--vllm-args", default="", metavar="WORDS", help="more for `vllm serve`")
    add("--baton-args", default="", metavar="WORDS", help="more for `baton worker`")
    add("--transformers-args", default="", metavar="WORDS", help="more for `transformers serve`")
    add("--transformers-env", type=_assignment, action="append", default=[], metavar="NAME=VALUE",
        help="such as a PYTHONPATH with accelerate, which it needs")  # fmt: skip
    add("--idle-cores", type=float, default=0.1, metavar="X",
        help="one that keeps more busy is suspended between turns (default: 0.1)")  # fmt: skip
    add("--foreign-cores", type=float, default=0.2, metavar="X",
        help="a turn in which other processes took more is repeated (default: 0.2)")  # fmt: skip
    add("--retries", type=int, default=1, metavar="N", help="of such a turn (default: 1)")
    add("--idle-look", type=float, default=0.5, metavar="S", help="how long to look (default: 0.5)")
    add("--settle", type=float, default=10.0, metavar="S", help="until when it may calm down")
    add("--start-timeout", type=float, default=300.0, metavar="S")
    add("--timeout", type=float, default=600.0, metavar="S", help="of one request")
    add("--logs", type=Path, default=Path("versus-logs"), metavar="DIR")
    add("--json", type=Path, metavar="FILE", help="write everything there, raw stamps included")
    return parser


def _pair(text: str) -> tuple[str, str]:
    ours, slash, theirs = text.partition("/")
    if not (ours and slash and theirs):
        raise argparse.ArgumentTypeError("write OURS/THEIRS")
    return ours, theirs


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError("write NAME=VALUE")
    return name, value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _counts(text: str) -> list[int]:
    return [_count(word) for word in text.split(",")]
