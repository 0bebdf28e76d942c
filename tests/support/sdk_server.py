"""A split server for the SDK tests, and what makes the noise model answer them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.demo_model import ensure_demo_model
from tests.support.live_server import LiveServer, LoopThread, live_server

MODEL = "demo"


@contextmanager
def sdk_server(folder: Path) -> Iterator[LiveServer]:
    """The demo model; calls are read in the Hermes form, and thoughts are content."""
    model = ensure_demo_model(folder / "demo")
    thread = LoopThread()
    try:
        settings = {"tool_call_parser": "hermes", "reasoning_parser": "none"}
        with live_server(thread, model, router=settings) as server:
            yield server
            server.wait_idle()
    finally:
        thread.close()
