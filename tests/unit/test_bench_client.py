"""What counts as a token in a stream."""

from typing import Any

import pytest

from benchmarks.client import Recording, SseParser
from benchmarks.metrics import Chunk, Phase
from benchmarks.schedule import PlannedRequest


def recording(wanted_tokens: int = 3) -> Recording:
    return Recording(PlannedRequest(0, Phase.WINDOW, 0.0, wanted_tokens, b""))


def delta(usage: int | None = None, finish: str | None = None, **content: object) -> dict[str, Any]:
    event: dict[str, Any] = {"choices": [{"index": 0, "delta": content, "finish_reason": finish}]}
    if usage is not None:
        event["usage"] = {"prompt_tokens": 7, "completion_tokens": usage}
    return event


def total(tokens: int) -> dict[str, Any]:
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    return {"choices": [], "usage": usage}


@pytest.mark.parametrize(
    ("events", "sizes"),
    [
        pytest.param(
            [delta(role="assistant", content=""), delta(content="a"), delta(content="b"), total(2)],
            [1, 1],
            id="role-alone-is-no-token",
        ),
        pytest.param(
            [delta(content="a"), delta(content="bc"), delta(finish="length"), total(3)],
            [1, 2],
            id="empty-last-chunk-is-no-token",
        ),
        pytest.param(
            [delta(reasoning="a"), delta(reasoning_content="b"), delta(tool_calls=[{}]), total(3)],
            [1, 1, 1],
            id="reasoning-and-tool-calls-are",
        ),
        pytest.param(
            [delta(0, role="assistant"), delta(2, content="ab"), delta(3, content="c"), total(3)],
            [2, 1],
            id="running-usage-says-how-many",
        ),
        pytest.param(
            [delta(1, content="a"), delta(1, content=""), delta(3, finish="length"), total(3)],
            [1, 2],
            id="running-usage-sees-tokens-without-text",
        ),
        pytest.param([], [], id="nothing"),
    ],
)
def test_chunks_that_carry_tokens(events: list[dict[str, Any]], sizes: list[int]) -> None:
    noted = recording()
    for at_s, event in enumerate(events):
        noted.take(event, float(at_s))
    noted.finished = True
    assert [chunk.tokens for chunk in noted.record().chunks] == sizes


def test_usage_and_stamps_reach_the_record() -> None:
    noted = recording(wanted_tokens=2)
    noted.sent_s = 0.25
    for at_s, event in ((1.0, delta(content="a")), (2.0, delta(content="b")), (3.0, total(2))):
        noted.take(event, at_s)
    noted.finished, noted.end_s = True, 3.5
    record = noted.record()
    assert record.chunks == (Chunk(1.0, 1), Chunk(2.0, 1))
    assert (record.sent_s, record.end_s) == (0.25, 3.5)
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (7, 2, 4)
    assert record.ok


@pytest.mark.parametrize(
    ("events", "finished", "error"),
    [
        pytest.param([delta(content="a"), total(1)], True, "short output", id="short"),
        pytest.param([delta(content="a"), total(3)], False, "unfinished", id="cancelled"),
        pytest.param([{"error": {"message": "x"}}], True, "error event", id="error-event"),
        pytest.param([delta(content="a"), total(3)], True, "", id="good"),
    ],
)
def test_errors(events: list[dict[str, Any]], finished: bool, error: str) -> None:
    noted = recording()
    for event in events:
        noted.take(event, 0.0)
    noted.finished = finished
    assert noted.record().error == error


STREAM = ': hello\n\ndata: {"a": 1}\n\ndata:{"b": "é"}\r\n\r\nevent: x\ndata: [DONE]\n\n'.encode()


@pytest.mark.parametrize("size", [1, 2, 7, len(STREAM)])
def test_sse_in_pieces_of_any_size(size: int) -> None:
    parser = SseParser()
    pieces = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    payloads = [payload for piece in pieces for payload in parser.feed(piece)]
    assert payloads == ['{"a": 1}', '{"b": "é"}', "[DONE]"]
