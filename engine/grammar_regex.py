"""Which regular expressions the first backend matches exactly, and how it must be given them."""

import re

from contracts.errors import InvalidRequest

MAX_REGEX = 32 * 1024
NO_NUL = re.compile(r"\\(?:0(?![0-9])|x00|u0000|x\{0+\})")
_POINT = r"x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}"
_IN_CLASS = rf"\\(?:[nrtf]|{_POINT}|[^\w\s])|[^\\\]\[&~|\x00]"
# What has the same meaning in both backends and in Python's `re`, piece by piece.
PIECE = re.compile(
    rf"""
    (?P<class>\[(?:\^(?:{_IN_CLASS})+|(?!\^)(?:\\[dws]|{_IN_CLASS})+)\])
    | (?P<dot>\.)
    | (?P<escape>\\(?:[dwsnrtf]|{_POINT}|[^\w\s]))
    | (?P<group>\((?:\?:|(?!\?)))
    | (?P<close>\))
    | (?P<bar>\|)
    | (?P<repeat>(?:[*+?]|\{{\d+(?:,\d*)?\}})\??(?![*+?{{]))
    | (?P<literal>[^\\\[\](){{}}|*+?.^$\x00])
    """,
    re.VERBOSE,
)


def check_regex(pattern: str) -> None:
    """Refuse what no backend should see.

    Raises:
        InvalidRequest: too long, or it can match NUL.
    """
    if len(pattern) > MAX_REGEX:
        raise InvalidRequest(f"a regular expression may have {MAX_REGEX} characters at most")
    if "\0" in pattern or NO_NUL.search(pattern):
        raise InvalidRequest("a regular expression may not contain NUL")


def strip_anchors(pattern: str) -> str:
    r"""Leave out \A, ^ at the start and \Z, $ at the end of a pattern that is anchored anyway.

    Only of one without alternatives at its top: elsewhere an anchor has a meaning.
    """
    start = 2 if pattern.startswith("\\A") else 1 if pattern.startswith("^") else 0
    end = len(pattern)
    for sign in ("\\Z", "\\z", "$"):
        escaped = (len(pattern) - len(pattern[: end - len(sign)].rstrip("\\")) - len(sign)) % 2
        if pattern.endswith(sign) and end - len(sign) >= start and not escaped:
            end -= len(sign)
            break
    return pattern[start:end]


def exact_regex(pattern: str) -> str | None:
    """The pattern as the first backend must get it; None if that would not match it exactly.

    That backend lets a dot match a newline and takes anchors, flags and classes of other
    alphabets differently.
    """
    inner = strip_anchors(pattern)
    pieces: list[str] = []
    depth = place = 0
    before = "start"
    while place < len(inner):
        found = PIECE.match(inner, place)
        if found is None:
            return None
        kind = found.lastgroup or ""
        if kind == "repeat" and before in ("start", "group", "bar", "repeat"):
            return None
        depth += (kind == "group") - (kind == "close")
        if depth < 0 or (kind == "bar" and depth == 0 and inner != pattern):
            return None
        pieces.append(r"[^\n]" if kind == "dot" else found.group())
        before, place = kind, found.end()
    return "".join(pieces) if depth == 0 else None
