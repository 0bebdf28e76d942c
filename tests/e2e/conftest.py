"""What tests with `baton ...` processes share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.demo_model import ensure_demo_model
from tests.support.commands import Command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(ensure_demo_model(tmp_path_factory.mktemp("models") / "demo"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def run(*arguments: str) -> Command:
        commands.append(Command(tmp_path / str(len(commands)), *arguments))
        return commands[-1]

    yield run
    for command in commands:
        command.close()
