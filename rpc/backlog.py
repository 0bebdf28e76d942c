"""What gathers while a write is blocked (S4): bounded, and merged before it is sent."""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from contracts.errors import Unavailable
from contracts.events import (
    Adopted,
    PathTaken,
    PrefillStarted,
    PromptScores,
    RequestFailed,
    TokensOut,
    WorkerEvent,
)
from rpc.wire import MAX_BACKLOG_BYTES, MAX_BACKLOG_ITEMS

T = TypeVar("T")

_Tail = tuple[int, int]  # attempt, choice


class Backlog(Generic[T]):
    """Items in order, each with its size. `take` hands all over, so that one write carries them."""

    def __init__(
        self, max_bytes: int = MAX_BACKLOG_BYTES, max_items: int = MAX_BACKLOG_ITEMS
    ) -> None:
        self._items: list[T] = []
        self._sizes: list[int] = []
        self._num_bytes = 0
        self._max_bytes = max_bytes
        self._max_items = max_items

    def __len__(self) -> int:
        return len(self._items)

    def is_half_full(self, num_bytes: int = 0) -> bool:
        """Whether more than half of the bound is taken, once `num_bytes` have been added."""
        return (
            2 * len(self._items) >= self._max_items
            or 2 * (self._num_bytes + num_bytes) > self._max_bytes
        )

    def add(self, item: T, num_bytes: int) -> None:
        """Append one.

        Raises:
            Unavailable: the bound is passed, so the other side reads too slowly to be kept.
        """
        if len(self._items) >= self._max_items or self._num_bytes + num_bytes > self._max_bytes:
            raise Unavailable(
                f"the other side does not keep up: {len(self._items)} messages, "
                f"{self._num_bytes} bytes wait"
            )
        self._items.append(item)
        self._sizes.append(num_bytes)
        self._num_bytes += num_bytes

    def take(self) -> tuple[list[T], list[int]]:
        """All items and their sizes; the backlog is empty afterwards."""
        items, sizes = self._items, self._sizes
        self._items, self._sizes, self._num_bytes = [], [], 0
        return items, sizes


def packed(items: Iterable[T], sizes: Iterable[int], max_bytes: int) -> Iterator[list[T]]:
    """Cut items into runs of at most `max_bytes`, in order; one that is longer is a run alone."""
    run: list[T] = []
    run_bytes = 0
    for item, num_bytes in zip(items, sizes, strict=True):
        if run and run_bytes + num_bytes > max_bytes:
            yield run
            run, run_bytes = [], 0
        run.append(item)
        run_bytes += num_bytes
    if run:
        yield run


def event_bytes(event: WorkerEvent) -> int:
    """At least the event's length on the wire, cheaply (a test holds it to that)."""
    size = 96 + _text_bytes(event.request_id)
    match event:
        case TokensOut():
            size += 4 * len(event.token_ids)
            if event.logprobs:
                size += sum(20 + 8 * len(entry.top) for entry in event.logprobs)
        case PromptScores():
            size += sum(12 + 8 * len(entry.top) for entry in event.entries)
        case PrefillStarted():
            size += _text_bytes(event.kv_transfer_params)
        case Adopted():
            size += _text_bytes(event.reason)
        case PathTaken():
            size += _text_bytes(event.path) + _text_bytes(event.cause)
        case RequestFailed():
            size += _text_bytes(event.kind) + _text_bytes(event.message) + _text_bytes(event.param)
    return size


def _text_bytes(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)


def merged(events: list[WorkerEvent]) -> list[WorkerEvent]:
    """Join tokens of one choice whose positions adjoin.

    The order among one request's other events and its tokens stays; an event that ends a choice
    stays the last of it. A router that applies the result knows exactly what it would have known.
    """
    if len(events) < 2:
        return events
    result: list[list[TokensOut] | WorkerEvent] = []
    tails: dict[str, dict[_Tail, list[TokensOut]]] = {}  # per request: runs that may grow
    for event in events:
        if not isinstance(event, TokensOut):
            tails.pop(event.request_id, None)
            result.append(event)
            continue
        runs = tails.setdefault(event.request_id, {})
        run = runs.get((event.attempt, event.choice))
        if run is not None and _adjoins(run[-1], event):
            run.append(event)
        else:
            run = runs[event.attempt, event.choice] = [event]
            result.append(run)
    return [_joined(entry) if isinstance(entry, list) else entry for entry in result]


def _adjoins(left: TokensOut, right: TokensOut) -> bool:
    return (
        left.finish is None
        and left.position + len(left.token_ids) == right.position
        and bool(left.logprobs) == bool(right.logprobs)
        and len(left.logprobs) in (0, len(left.token_ids))
        and len(right.logprobs) in (0, len(right.token_ids))
    )


def _joined(run: list[TokensOut]) -> TokensOut:
    if len(run) == 1:
        return run[0]
    first = run[0]
    return TokensOut(
        request_id=first.request_id,
        attempt=first.attempt,
        choice=first.choice,
        position=first.position,
        token_ids=tuple(token_id for part in run for token_id in part.token_ids),
        logprobs=tuple(entry for part in run for entry in part.logprobs),
        finish=run[-1].finish,
    )
