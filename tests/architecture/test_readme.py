"""The commands that the README shows are commands that exist."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from cluster.cli import make_parser

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL))
COMMANDS = sorted(
    {line.strip() for line in BLOCKS.splitlines() if line.startswith("baton ")}
    | set(re.findall(r"`(baton [^`…]*? [^`…]*)`", TEXT))
)


def test_there_are_commands_of_every_kind() -> None:
    words = {tuple(command.split()[:2]) for command in COMMANDS}
    assert words >= {("baton", verb) for verb in ("serve", "worker", "router", "status", "bench")}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_takes_it(command: str) -> None:
    _, *arguments = shlex.split(command, comments=True)
    parsed = make_parser().parse_args(arguments)  # exits if it does not understand
    if parsed.command == "bench":
        import_module(f"benchmarks.{parsed.kind}").parser().parse_args(parsed.rest)


def test_the_curl_and_the_port_agree_with_the_makefile() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    (port,) = re.findall(r"^PORT \?= (\d+)$", makefile, flags=re.MULTILINE)
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in TEXT
    assert f'base_url="http://127.0.0.1:{port}/v1"' in TEXT
    assert f"http://127.0.0.1:{port}" in (REPOSITORY / "examples/stream_curl.sh").read_text()
