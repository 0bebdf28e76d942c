"""A response as it grows: its items, and the events that tell of each step.

The full answer is what the events of a stream add up to, for both come from the same builder.
"""

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from router.deltas import Content, Delta, Reasoning, ToolArguments, ToolCallStart
from router.job import Usage
from router.logprobs import LogprobEntry
from router.pieces import Piece

Event = dict[str, Any]


@dataclass(slots=True)
class _Item:
    """An item of the output. `done` is what it is once nothing more comes."""

    item_id: str
    kind: str  # message, reasoning, function_call
    text: str = ""
    name: str = ""
    call_id: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def json(self, status: str) -> dict[str, Any]:
        """The item; empty as long as it is in progress."""
        whole = status != "in_progress"
        body: dict[str, Any] = {"id": self.item_id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            arguments = self.text if whole else ""
            return body | {"call_id": self.call_id, "name": self.name, "arguments": arguments}
        content = [self.part()] if whole else []
        if self.kind == "reasoning":
            return body | {"summary": [], "content": content, "encrypted_content": None}
        return body | {"role": "assistant", "content": content}

    def part(self, *, empty: bool = False) -> dict[str, Any]:
        """The one content part of a message or of thoughts."""
        text = "" if empty else self.text
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = [] if empty else self.logprobs
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class ResponseBuilder:
    """Takes pieces, gives events; `response` is the object as it stands."""

    def __init__(
        self,
        response_id: str,
        created: int,
        model: str,
        echoed: dict[str, Any],
        *,
        want_logprobs: bool = False,
    ) -> None:
        self._head = {
            "id": response_id,
            "object": "response",
            "created_at": created,
            "model": model,
            **echoed,
        }
        self._want_logprobs = want_logprobs
        self._sequence = 0
        self._items: list[_Item] = []
        self._done: list[dict[str, Any]] = []
        self._open = False
        self._blank = ""  # white space that may turn out to stand between items only
        self._entries: list[LogprobEntry] = []  # of text that has not been shown yet
        self._finish_reason: str | None = None
        self.num_entries = 0  # tokens shown with log-probabilities

    # What happens

    def begin(self) -> list[Event]:
        """The first events."""
        response = self.response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def add(self, piece: Piece) -> list[Event]:
        """The events of a piece."""
        events: list[Event] = []
        if self._want_logprobs:
            self._entries.extend(piece.logprobs)
        for delta in piece.parts:
            events += self._delta(delta)
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason
            events += self._last()
        return events

    def end(self, usage: Usage) -> list[Event]:
        """The last event: the whole response."""
        response = self.response(self._status(), usage)
        return [self._event(f"response.{response['status']}", response=response)]

    def failed(self, message: str) -> list[Event]:
        """The last event of a response that cannot go on."""
        response = self.response("failed")
        response["error"] = {"code": "server_error", "message": message}
        return [self._event("response.failed", response=response)]

    def response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        """The response object; its output holds the finished items."""
        cut = status == "incomplete"
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": list(self._done),
            "usage": None if usage is None else _usage_json(usage),
        }

    def whole(self, usage: Usage) -> dict[str, Any]:
        """The response at its end."""
        return self.response(self._status(), usage)

    # Items

    def _status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _delta(self, delta: Delta) -> list[Event]:
        match delta:
            case Content(text):
                return self._content(text)
            case Reasoning(text):
                events = self._need("reasoning", "rs")
                self._items[-1].text += text
                self._entries.clear()
                return [*events, self._piece("response.reasoning_text.delta", delta=text)]
            case ToolCallStart(_, call_id, name):
                events = self._close("completed")
                self._entries.clear()
                item = _Item(_new_id("fc"), "function_call", name=name, call_id=call_id)
                return [*events, *self._start(item)]
            case ToolArguments(_, text):
                self._items[-1].text += text
                self._entries.clear()
                return [self._of_item("response.function_call_arguments.delta", delta=text)]

    def _content(self, text: str) -> list[Event]:
        """Text of the answer; a message does not begin with white space alone."""
        text, self._blank = self._blank + text, ""
        if not self._is_open("message") and not text.strip():
            self._blank = text
            return []
        events = self._need("message", "msg")
        item = self._items[-1]
        item.text += text
        logprobs = [_logprob_json(entry) for entry in self._entries]
        self._entries.clear()
        item.logprobs.extend(logprobs)
        self.num_entries += len(logprobs)
        return [
            *events,
            self._piece("response.output_text.delta", delta=text, logprobs=logprobs),
        ]

    def _last(self) -> list[Event]:
        """Close what is open; there is always something to show."""
        events: list[Event] = []
        if self._entries and self._is_open("message"):  # of end tokens, which show no text
            item = self._items[-1]
            item.logprobs.extend(map(_logprob_json, self._entries))
        if not self._items:
            events += self._need("message", "msg")
            self._items[-1].text = self._blank
            if self._blank:
                text = self._blank
                events.append(self._piece("response.output_text.delta", delta=text, logprobs=[]))
        return events + self._close(self._status())

    def _is_open(self, kind: str) -> bool:
        return self._open and self._items[-1].kind == kind

    def _need(self, kind: str, prefix: str) -> list[Event]:
        """An open item of that kind."""
        if self._is_open(kind):
            return []
        return [*self._close("completed"), *self._start(_Item(_new_id(prefix), kind))]

    def _start(self, item: _Item) -> list[Event]:
        self._blank = ""
        self._items.append(item)
        self._open = True
        index = len(self._items) - 1
        added = "response.output_item.added"
        events = [self._event(added, output_index=index, item=item.json("in_progress"))]
        if item.kind != "function_call":
            events.append(self._piece("response.content_part.added", part=item.part(empty=True)))
        return events

    def _close(self, status: str) -> list[Event]:
        if not self._open:
            return []
        self._open = False
        item = self._items[-1]
        if item.kind == "function_call":
            name = "response.function_call_arguments.done"
            events = [self._of_item(name, arguments=item.text, name=item.name)]
        elif item.kind == "reasoning":
            events = [self._piece("response.reasoning_text.done", text=item.text)]
        else:
            done = {"text": item.text, "logprobs": item.logprobs}
            events = [self._piece("response.output_text.done", **done)]
        if item.kind != "function_call":
            events.append(self._piece("response.content_part.done", part=item.part()))
        whole = item.json(status)
        self._done.append(whole)
        index = len(self._items) - 1
        events.append(self._event("response.output_item.done", output_index=index, item=whole))
        return events

    # Events

    def _piece(self, kind: str, **fields: Any) -> Event:
        return self._of_item(kind, content_index=0, **fields)

    def _of_item(self, kind: str, **fields: Any) -> Event:
        index = len(self._items) - 1
        return self._event(kind, item_id=self._items[-1].item_id, output_index=index, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


def _logprob_json(entry: LogprobEntry) -> dict[str, Any]:
    def one(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    return {
        **one(entry.token, entry.logprob),
        "top_logprobs": [one(token, value) for token, value in entry.top],
    }


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
