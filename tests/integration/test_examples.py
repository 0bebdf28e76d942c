"""Each program in examples/ runs. The server is a stand-in: what they show is the client side."""

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.chat_standin import Behaviour, ChatStandIn

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
async def server() -> AsyncIterator[ChatStandIn]:
    standin = ChatStandIn(Behaviour())
    await standin.start()
    try:
        yield standin
    finally:
        await standin.stop()


async def run(*command: str, **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"} | environment,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_chat_openai(server: ChatStandIn) -> None:
    url = f"{server.url}/v1"
    code, out, err = await run(
        sys.executable, str(EXAMPLES / "chat_openai.py"), "Hi?", "--url", url, "--max-tokens", "5"
    )
    assert code == 0, err
    assert out.startswith("word word word word word ")
    assert "5 answer tokens" in out
    assert server.seen[0].body["messages"] == [{"role": "user", "content": "Hi?"}]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_stream_curl(server: ChatStandIn) -> None:
    quoted = 'Say "hi" to O\'Neil'
    script = str(EXAMPLES / "stream_curl.sh")
    code, out, err = await run(script, quoted, BATON_URL=server.url)
    assert code == 0, err
    assert out.rstrip().endswith("data: [DONE]")
    assert server.seen[0].body["messages"][0]["content"] == quoted


def test_every_example_has_its_test() -> None:
    here = Path(__file__).read_text()
    for file in EXAMPLES.iterdir():
        assert file.name in here
