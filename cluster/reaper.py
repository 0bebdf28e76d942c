"""Ends a program and everything it started, when the program ends or its launcher is gone.

Run as `python -m cluster.reaper PIPE_FD GRACE_S [--remove FOLDER] -- COMMAND...`, in a session of
its own. PIPE_FD is the read end of a pipe whose write end only the launcher holds, so its end of
file means: the launcher has ended, whatever the reason (kill -9 too). Then the program gets SIGTERM
and GRACE_S seconds. A byte in the pipe means: no grace.

The reaper is a subreaper (prctl(2)): every process whose parent dies below it becomes its child.
So what the program started cannot escape, and a process of somebody else is never touched.
Standard library only, for it starts before everything else.
"""

import ctypes
import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code (128 + signal number if a signal ended it)."""
    args = sys.argv[1:] if argv is None else argv
    split = args.index("--")
    pipe_fd, grace_s = int(args[0]), float(args[1])
    folder = args[3] if args[2:3] == ["--remove"] else None
    os.set_inheritable(pipe_fd, False)
    become_subreaper()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    code = supervise(args[split + 1 :], pipe_fd, grace_s)
    if folder is not None and code == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def become_subreaper() -> None:
    """Make this process the parent of all orphans below it. Linux only."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Ask for SIGTERM when the parent dies."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def supervise(command: list[str], pipe_fd: int, grace_s: float) -> int:
    """Start `command`, wait for its end or the pipe's, and leave no descendant."""
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, _ignore)
    signal.signal(signal.SIGTERM, _ignore)
    pid = os.posix_spawnp(
        command[0],
        command,
        os.environ,
        setsigmask=(),
        setsigdef=(signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM, signal.SIGCHLD),
    )
    try:
        return _until_ended(pid, pipe_fd, wake_read, grace_s)
    finally:
        end_descendants()
        signal.set_wakeup_fd(-1)
        os.close(wake_read)
        os.close(wake_write)


def _until_ended(pid: int, pipe_fd: int, wake_read: int, grace_s: float) -> int:
    watched = [pipe_fd, wake_read]
    deadline: float | None = None
    while True:
        code = _reap(pid)
        if code is not None:
            return code
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = select.select(watched, [], [], left_s)[0]
        stop = kill = deadline is not None and not ready
        if wake_read in ready:
            stop = stop or signal.SIGTERM in os.read(wake_read, 4096)
        if pipe_fd in ready:
            stop = True
            kill = bool(os.read(pipe_fd, 1))
            if not kill:
                watched = [wake_read]
        if kill:
            _signal(pid, signal.SIGKILL)
        elif stop and deadline is None:
            deadline = time.monotonic() + grace_s
            _signal(pid, signal.SIGTERM)


def end_descendants(limit_s: float = 10.0) -> None:
    """Kill the children of this process and theirs, until there are none."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        pids = descendants(os.getpid())
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        _reap(-1)
        if not pids:
            return
        time.sleep(0.01)


def descendants(root: int) -> list[int]:
    """The processes below `root`, parents first, as /proc shows them now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                # "pid (name) state ppid ...", where name may hold blanks and brackets
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def _reap(pid: int) -> int | None:
    """Collect all ended children; the exit code of `pid` if it is among them."""
    code: int | None = None
    with suppress(ChildProcessError):
        while True:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == 0:
                break
            if ended == pid:
                exit_code = os.waitstatus_to_exitcode(status)
                code = exit_code if exit_code >= 0 else 128 - exit_code
    return code


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _ignore(number: int, frame: object) -> None:
    """A handler must be there for the wake-up; the work is done in the loop."""


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


if __name__ == "__main__":
    sys.exit(main())
