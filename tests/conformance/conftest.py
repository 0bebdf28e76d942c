"""The servers of the suite: every test runs against a split and an aggregated one.

BATON_TEST_BASE_URL (`http://host:port`) and BATON_TEST_MODEL name another server instead, which
must serve the demo model (cluster/demo_model.py) with this folder's chat template (docs/api.md).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from tokenizers import Tokenizer

from cluster.demo_model import ensure_demo_model
from tests.support.conformance import Api, Json, assert_same
from tests.support.live_server import MODEL, LiveServer, LoopThread, live_server

EXTERNAL_URL = os.environ.get("BATON_TEST_BASE_URL", "").removesuffix("/").removesuffix("/v1")
EXTERNAL_MODEL = os.environ.get("BATON_TEST_MODEL", MODEL)
MODES = ["external"] if EXTERNAL_URL else ["split", "aggregated"]
TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
ROUTER: dict[str, Any] = {
    "model_aliases": ("also-demo",),
    "chat_template": TEMPLATE,
    "trust_request_chat_template": True,
    "tool_call_parser": "hermes",
    "reasoning_parser": "none",
    "logits_processor_pattern": r"tests\.support\.processors\.\w+",
    "max_logprobs": -1,
    "allow_kv_transfer_params": True,
}
WORKER: dict[str, Any] = {"logits_processor_pattern": ROUTER["logits_processor_pattern"]}


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_model(tmp_path_factory.mktemp("conformance") / "demo")


@pytest.fixture(scope="session")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_model / "tokenizer.json"))


@pytest.fixture(scope="session", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def url(mode: str, loop_thread: LoopThread, demo_model: Path) -> Iterator[str]:
    """Where the server under test is. Of ours, one runs at a time."""
    if mode == "external":
        yield EXTERNAL_URL
        return
    aggregated = mode == "aggregated"
    with live_server(
        loop_thread, demo_model, aggregated=aggregated, router=ROUTER, worker=WORKER
    ) as server:
        yield server.url
        server.wait_idle()


@pytest.fixture(scope="session")
def make_api(tokenizer: Tokenizer) -> Iterator[Callable[[str], Api]]:
    """A client of a server, by URL."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    with ExitStack() as stack:

        def make(url: str) -> Api:
            client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
            stack.enter_context(client)
            model = EXTERNAL_MODEL if url == EXTERNAL_URL else MODEL
            return Api(client, model, tokenizer, url)

        yield make


@pytest.fixture(scope="session")
def session_api(url: str, make_api: Callable[[str], Api]) -> Api:
    return make_api(url)


@pytest.fixture(scope="session")
def first_answers() -> dict[str, list[Json]]:
    """What the first server answered, by test."""
    return {}


@pytest.fixture
def api(
    session_api: Api, request: pytest.FixtureRequest, first_answers: dict[str, list[Json]]
) -> Iterator[Api]:
    """The server under test. All its full answers must equal those of the other server."""
    session_api.answers.clear()
    yield session_api
    answers = list(session_api.answers)
    test = request.node.nodeid.replace(request.getfixturevalue("mode"), "")
    if test not in first_answers:
        first_answers[test] = answers
        return
    assert len(first_answers[test]) == len(answers)
    for one, other in zip(first_answers[test], answers, strict=True):
        assert_same(one, other)


@pytest.fixture
def own_server(
    mode: str, loop_thread: LoopThread, demo_model: Path, make_api: Callable[[str], Api]
) -> Iterator[Callable[..., tuple[Api, LiveServer]]]:
    """Start a server of the test's own: `router` and `worker` override the suite's settings."""
    if mode == "external":
        pytest.skip("needs a server with other settings")
    with ExitStack() as stack:

        def start(
            *, model: Path | None = None, router: Json | None = None, worker: Json | None = None
        ) -> tuple[Api, LiveServer]:
            server = stack.enter_context(
                live_server(
                    loop_thread,
                    model or demo_model,
                    aggregated=mode == "aggregated",
                    router={**ROUTER, **(router or {})},
                    worker={**WORKER, **(worker or {})},
                )
            )
            return make_api(server.url), server

        yield start


@pytest.fixture
def only_baton(mode: str) -> None:
    """Skips where another server is tested that says nothing about this."""
    if mode == "external":
        pytest.skip("of our own")


@pytest.fixture(scope="session")
def variant(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The demo model with keys of one of its JSON files replaced."""

    def make(file_name: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("variant") / "model"
        shutil.copytree(demo_model, folder)
        (folder / "baton_demo.json").unlink()  # it is not the demo model any more
        file = folder / file_name
        settings = {**json.loads(file.read_text(encoding="utf-8")), **changes}
        file.write_text(json.dumps(settings), encoding="utf-8")
        return folder

    return make
