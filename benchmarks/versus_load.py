"""A closed loop against one server: so many requests at once, each replaced when it ends."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.client import ChatClient, Recording
from benchmarks.metrics import Phase, RequestRecord, percentile
from benchmarks.schedule import PlannedRequest


@dataclass(frozen=True, slots=True)
class Cell:
    """What is asked in one cell of the table."""

    prompt_tokens: int
    concurrency: int

    def __str__(self) -> str:
        return f"{self.prompt_tokens} tokens x{self.concurrency}"


@dataclass(frozen=True, slots=True)
class Figures:
    """One turn in short, or the medians of several. Times in seconds.

    `chunk_tokens` is the mean number of tokens in a chunk: above 1, gaps between chunks (ITL) are
    longer than those between tokens (TPOT).
    """

    output_tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    tpot_p50_s: float
    chunk_tokens: float


class BadTurn(Exception):
    """A turn that says nothing: a request failed, or prompt or answer had another length."""


@dataclass(slots=True)
class PeerRecording(Recording):
    """Takes servers as well that tell their usage in the last chunk of a choice only.

    A choice's finish reason is an end, too: not every server sends [DONE].
    """

    def take(self, event: dict[str, Any], at_s: float) -> None:
        """Note one event; see Recording."""
        usage, choices = event.get("usage"), event.get("choices") or []
        self.finished = self.finished or any(choice.get("finish_reason") for choice in choices)
        late = isinstance(usage, dict) and bool(choices) and not self.usage and bool(self.contents)
        if late and not any((choice.get("delta") or {}).get("content") for choice in choices):
            assert isinstance(usage, dict)
            self.usage = usage  # not a chunk with all tokens in it
            return
        Recording.take(self, event, at_s)


def make_body(model: str, message: str, output_tokens: int, *, strict: bool) -> bytes:
    """A streamed greedy chat request; `strict` servers get no field but OpenAI's."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": message}],
        "max_tokens": output_tokens,
        "temperature": 0,
        "stream": True,
    }
    if not strict:
        body["ignore_eos"] = True
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return json.dumps(body).encode()


async def closed_loop(
    client: ChatClient, bodies: Sequence[bytes], concurrency: int, output_tokens: int
) -> list[RequestRecord]:
    """Send all bodies, `concurrency` at once; their records, in order."""
    origin = time.perf_counter()
    recordings = [
        PeerRecording(PlannedRequest(index, Phase.WINDOW, 0.0, output_tokens, body))
        for index, body in enumerate(bodies)
    ]
    waiting = iter(recordings)

    async def one_after_another() -> None:
        for recording in waiting:  # shared: whoever is free takes the next one
            await client.stream(recording, origin)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(recordings))):
            group.create_task(one_after_another())
    return [recording.record() for recording in recordings]


def figures(records: Sequence[RequestRecord], *, prompt_tokens: int, output_tokens: int) -> Figures:
    """Of one turn.

    Throughput counts from the first request sent to the last stream's end, TTFT from a request's
    own sending.

    Raises:
        BadTurn: a request failed, or was not of the wanted size.
    """
    for record in records:
        if not record.ok:
            raise BadTurn(f"request {record.index}: {record.error or 'no token came'}")
        sizes = (record.prompt_tokens, record.completion_tokens)
        if sizes != (prompt_tokens, output_tokens):
            raise BadTurn(
                f"request {record.index} had {sizes[0]} prompt and {sizes[1]} output tokens,"
                f" not {prompt_tokens} and {output_tokens}"
            )
    ttfts = [record.ttft_wire_s for record in records if record.ttft_wire_s is not None]
    gaps = [gap for record in records for gap in record.gaps_s]
    tpots = [record.tpot_s for record in records if record.tpot_s is not None]
    ends = [record.end_s for record in records if record.end_s is not None]
    starts = [record.sent_s for record in records if record.sent_s is not None]
    tokens = sum(record.completion_tokens for record in records)
    return Figures(
        output_tokens_per_s=tokens / (max(ends) - min(starts)),
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p99_s=percentile(ttfts, 99),
        itl_p50_s=percentile(gaps, 50),
        itl_p99_s=percentile(gaps, 99),
        tpot_p50_s=percentile(tpots, 50),
        chunk_tokens=tokens / sum(len(record.chunks) for record in records),
    )


def medians(turns: Sequence[Figures]) -> Figures:
    """The median of each figure over the turns (at least one)."""
    return Figures(
        **{
            name: percentile([asdict(turn)[name] for turn in turns], 50)
            for name in asdict(turns[0])
        }
    )
