"""Loading nixl leaves the process's logging alone."""

import subprocess
import sys

PROGRAM = """
import logging, logging.handlers
handler = logging.handlers.MemoryHandler(10, target=logging.NullHandler())
logging.getLogger("ours").addHandler(handler)
from kv_transfer.nixl import NixlConnector
NixlConnector("x").close()
assert logging.raiseExceptions, "nixl switched it off"
assert handler.target is not None, "nixl closed a handler"
"""


def test_handlers_of_others_stay_open() -> None:
    """Its own logging.config.dictConfig would close every handler there is."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
