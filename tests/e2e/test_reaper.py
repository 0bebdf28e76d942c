"""The reaper ends what it started, whatever its launcher and its program do; and nothing else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

TIMEOUT_S = 20.0

# A launcher: starts the reaper with a pipe, as `baton serve` does, and waits.
LAUNCHER = """
import os, subprocess, sys, threading
read, write = os.pipe()
command = [sys.executable, "-m", "cluster.reaper", str(read), sys.argv[1], *sys.argv[2:]]
reaper = subprocess.Popen(command, pass_fds=[read], start_new_session=True)
os.close(read)
print(reaper.pid, flush=True)
def cut_short():
    for line in sys.stdin:
        os.write(write, b"k")
threading.Thread(target=cut_short, daemon=True).start()
os._exit(reaper.wait())
"""
# A program with a child that tries to escape: new session, parent gone, deaf to SIGTERM.
PROGRAM = """
import os, signal, sys, time
folder, deaf, code = sys.argv[1], sys.argv[2] == "deaf", sys.argv[3]
def note(name, text):
    with open(os.path.join(folder, name + ".part"), "w") as file:
        file.write(text)
    os.rename(os.path.join(folder, name + ".part"), os.path.join(folder, name))
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note("escaped", str(os.getpid()))
        time.sleep(600)
    os._exit(0)
def end(number, frame):
    note("asked", "to end")
    if not deaf:
        sys.exit(0)
signal.signal(signal.SIGTERM, end)
note("running", str(os.getpid()))
if code != "wait":
    while not os.path.exists(os.path.join(folder, "escaped")):
        time.sleep(0.01)
    sys.exit(int(code))
while True:
    time.sleep(600)
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def ended(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class Run:
    """A launcher with everything below it."""

    def __init__(
        self, folder: Path, *, deaf: bool = False, grace_s: float = 60, code: str = "wait"
    ) -> None:
        self.folder = folder
        program = [sys.executable, "-c", PROGRAM, str(folder), "deaf" if deaf else "polite", code]
        arguments = [str(grace_s), "--remove", str(folder / "session"), "--", *program]
        (folder / "session").mkdir()
        self.launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.launcher.stdout is not None
        self.reaper = int(self.launcher.stdout.readline())

    def pid(self, name: str) -> int:
        file = self.folder / name
        wait_for(file.exists)
        return int(file.read_text())

    def close(self) -> None:
        assert self.launcher.stdin is not None
        assert self.launcher.stdout is not None
        for pid in (self.launcher.pid, self.reaper):
            if not ended(pid):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()
        self.launcher.stdout.close()
        self.launcher.stdin.close()
        for name in ("running", "escaped"):
            if (self.folder / name).exists() and not ended(pid := self.pid(name)):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def run(**options: Any) -> Run:
        runs.append(Run(tmp_path, **options))
        return runs[-1]

    yield run
    for each in runs:
        each.close()


def all_ended(run: Run, *pids: int) -> None:
    for pid in (run.reaper, *pids):
        wait_for(lambda pid=pid: ended(pid))  # type: ignore[misc]


def test_kill_9_of_the_launcher_ends_all_and_asks_first(start: Callable[..., Run]) -> None:
    run = start()
    pids = run.pid("running"), run.pid("escaped")
    run.launcher.kill()
    all_ended(run, *pids)
    assert (run.folder / "asked").exists()
    assert not (run.folder / "session").exists()


def test_a_deaf_program_is_killed_after_the_grace_time(start: Callable[..., Run]) -> None:
    run = start(deaf=True, grace_s=0.2)
    pids = run.pid("running"), run.pid("escaped")
    run.launcher.kill()
    all_ended(run, *pids)
    assert (run.folder / "asked").exists()
    assert (run.folder / "session").exists()  # its logs may be wanted


def test_sigterm_to_the_reaper_is_a_polite_end(start: Callable[..., Run]) -> None:
    run = start()
    pids = run.pid("running"), run.pid("escaped")
    os.kill(run.reaper, signal.SIGTERM)
    assert run.launcher.wait(TIMEOUT_S) == 0
    all_ended(run, *pids)
    assert (run.folder / "asked").exists()


def test_a_byte_in_the_pipe_cuts_the_grace_time_short(start: Callable[..., Run]) -> None:
    run = start(deaf=True)
    pids = run.pid("running"), run.pid("escaped")
    os.kill(run.reaper, signal.SIGTERM)
    wait_for((run.folder / "asked").exists)
    assert run.launcher.stdin is not None
    run.launcher.stdin.write("at once\n")
    run.launcher.stdin.flush()
    all_ended(run, *pids)


def test_ctrl_c_is_for_the_launcher_alone(start: Callable[..., Run]) -> None:
    run = start()
    program = run.pid("running")
    os.kill(run.reaper, signal.SIGINT)
    os.kill(run.reaper, signal.SIGTERM)  # handled after the SIGINT above
    assert run.launcher.wait(TIMEOUT_S) == 0
    all_ended(run, program)
    assert (run.folder / "asked").exists()


@pytest.mark.parametrize("code", ["0", "3"])
def test_when_the_program_ends_its_children_do_and_its_code_is_passed_on(
    start: Callable[..., Run], code: str
) -> None:
    run = start(code=code)
    escaped = run.pid("escaped")
    assert run.launcher.wait(TIMEOUT_S) == int(code)
    all_ended(run, escaped)
    assert (run.folder / "session").exists() == (code != "0")


def test_a_program_that_dies_by_a_signal(start: Callable[..., Run]) -> None:
    run = start()
    pids = run.pid("running"), run.pid("escaped")
    os.kill(pids[0], signal.SIGKILL)
    assert run.launcher.wait(TIMEOUT_S) == 128 + signal.SIGKILL
    all_ended(run, *pids)


def test_processes_of_others_are_not_touched(start: Callable[..., Run]) -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as stranger:
        try:
            run = start()
            run.pid("escaped")
            run.launcher.kill()
            all_ended(run)
            assert stranger.poll() is None
        finally:
            stranger.kill()
