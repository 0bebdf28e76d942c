"""`continue_final_message`: a rendered conversation cut after its last message's text.

Nobody knows where a template puts a message's text, and what it writes after it. So the text gets
a mark before rendering, and the rendered conversation is cut where the mark comes out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from contracts.errors import InvalidRequest

_MARK = "\uf8ffEND OF FINAL MESSAGE\uf8ff"  # private use, so it is nobody's text
_PARAM = "continue_final_message"
_SYSTEM = ("system", "developer")


def mark_open_end(messages: Sequence[dict[str, Any]], last: Mapping[str, Any]) -> str:
    """Mark the end of the last message's text in place; return the text.

    `messages` are ready for a template; `last` is the last one as it was sent.

    Raises:
        InvalidRequest: the last message has no text, or had to be moved to the front.
    """
    message = messages[-1]
    if last.get("content") is None:
        raise InvalidRequest("the final message has no content to continue", _PARAM)
    if last["role"] in _SYSTEM and message["role"] not in _SYSTEM:
        raise InvalidRequest("the final message joins the system message in front", _PARAM)
    content = message["content"]
    if isinstance(content, str):
        message["content"] = f"{content}{_MARK} "
        return content
    if not content:
        raise InvalidRequest("the final message has no text to continue", _PARAM)
    part: dict[str, Any] = content[-1]
    text: str = part["text"]
    part["text"] = f"{text}{_MARK} "
    return text


def cut_open_end(rendered: str, final: str) -> str:
    """The text up to the mark. Space that the template trims off a message is trimmed here too.

    Raises:
        InvalidRequest: the template changes or drops the final message.
    """
    end = rendered.rfind(_MARK)
    if end < 0 or final.strip() not in rendered:
        raise InvalidRequest(
            "the final message cannot be continued: the chat template does not show it unchanged",
            _PARAM,
        )
    text = rendered[:end]
    if not rendered.startswith(" ", end + len(_MARK)):  # the space after the mark was trimmed
        text = text.removesuffix(final[len(final.rstrip()) :])
    return text
