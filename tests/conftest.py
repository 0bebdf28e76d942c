"""What holds for the whole run: nothing is left behind."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


def shared_memory_files() -> set[str]:
    folder = Path("/dev/shm")
    own = [f for f in folder.iterdir() if f.stat().st_uid == os.getuid()] if folder.is_dir() else []
    return {file.name for file in own}


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No child process, listening socket or shared-memory file outlives the tests."""
    before = shared_memory_files()
    yield
    me = psutil.Process()
    children = [f"{p.pid} {p.name()}" for p in me.children(recursive=True)]
    listening = [c.laddr for c in me.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    assert children == []
    assert listening == []
    assert shared_memory_files() - before == set()
