"""Where a process is: `kill -USR1 PID` writes the stacks of its threads and tasks to stderr."""

import asyncio
import faulthandler
import signal
import sys


def tell_on_signal(loop: asyncio.AbstractEventLoop) -> None:
    """Listen for SIGUSR1. Threads are told even if the loop is stuck, tasks if it is not."""

    def tell_tasks() -> None:
        lines = []
        for task in asyncio.all_tasks(loop):
            lines.append(f"Stack for {task!r} (most recent call last):")
            for frame in task.get_stack(limit=8):
                code = frame.f_code
                lines.append(
                    f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'
                )
        print("\n".join(lines), file=sys.stderr, flush=True)

    loop.add_signal_handler(signal.SIGUSR1, tell_tasks)
    faulthandler.register(signal.SIGUSR1, chain=True)  # after it: the first to be called
