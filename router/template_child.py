"""The child process that renders templates which clients send: `python -m router.template_child`.

Frames on stdin and stdout: 4 bytes length, big endian, then JSON. One question, one answer. The
kernel bounds what a template may do: memory by a limit, time by an alarm that ends the process,
files by a size limit of nothing. With its parent gone, it reads the end of stdin and ends.
"""

import json
import resource
import signal
import sys
from collections import OrderedDict
from typing import IO, Any

from contracts.errors import ConfigurationError, InvalidRequest
from router.prompt_request import PromptRequest
from router.template import ChatTemplate

_TEMPLATES = 32  # compiled ones kept
_GRACE_S = 1.0  # the template's own clock comes first; the alarm is for what never looks at it


def read_frame(stream: IO[bytes], max_bytes: int) -> bytes:
    """The next frame; empty at the end of the stream, or if the frame is too large or cut."""
    head = stream.read(4)
    size = int.from_bytes(head, "big")
    if len(head) < 4 or size > max_bytes:
        return b""
    body = stream.read(size)
    return body if len(body) == size else b""


def write_frame(stream: IO[bytes], body: bytes) -> None:
    """Write one frame and flush."""
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


def _answer(question: dict[str, Any], templates: OrderedDict[str, ChatTemplate]) -> dict[str, Any]:
    source: str = question["template"]
    try:
        template = templates.get(source)
        if template is None:
            template = ChatTemplate(source, question["special_tokens"], blame="chat_template")
            templates[source] = template
            if len(templates) > _TEMPLATES:
                templates.popitem(last=False)
        templates.move_to_end(source)
        rendered = template.render(
            PromptRequest(**question["request"]),
            timeout_s=question["timeout_s"],
            max_chars=question["max_chars"],
        )
    except InvalidRequest as error:
        return {"error": str(error), "param": error.param}
    except ConfigurationError as error:
        return {"error": str(error), "param": "chat_template"}
    return {
        "text": rendered.text,
        "last_role": rendered.last_role,
        "last_text": rendered.last_text,
    }


def main(memory_bytes: int) -> None:
    """Answer until stdin ends."""
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    templates: OrderedDict[str, ChatTemplate] = OrderedDict()
    while body := read_frame(questions, 1 << 31):
        question = json.loads(body)
        signal.setitimer(signal.ITIMER_REAL, question["timeout_s"] + _GRACE_S)
        answer = json.dumps(_answer(question, templates)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_frame(answers, answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
