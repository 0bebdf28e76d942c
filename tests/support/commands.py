"""`baton ...` commands as ordinary processes."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S = 150.0
CLUSTER_KEY = "a key for these processes"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("BATON_")} | {
    "BATON_CLUSTER_KEY": CLUSTER_KEY,
    "BATON_LOG_LEVEL": "INFO",
}


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {TIMEOUT_S:.0f} s for {what}"
        time.sleep(0.02)


class Command:
    """One `baton ...` process."""

    def __init__(self, output: Path, *arguments: str) -> None:
        self._output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
            )

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8")

    def ready(self, pattern: str) -> str:
        """What the ready line says, once it is there."""

        def told() -> object:
            return re.search("^baton .*ready", self.output, re.M) or self.process.poll() is not None

        wait_for(told, "the ready line")
        found = re.search(pattern, self.output, re.MULTILINE)
        assert found is not None, self.output
        return found[1]

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
