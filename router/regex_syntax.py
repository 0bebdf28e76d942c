"""A quick look at a regular expression: what no dialect accepts is refused before any compute.

The workers compile it; dialects differ, so this checks only what is wrong in all of them.
"""

_MAX_NESTING = 64


def regex_error(pattern: str) -> str | None:
    """Why `pattern` cannot be a regular expression; None if nothing is wrong at first sight."""
    depth = 0
    repeatable = False  # whether something stands before this place that a quantifier may repeat
    index = 0
    while index < len(pattern):
        char = pattern[index]
        if char == "\0":
            return "it holds a NUL"
        if char == "\\":
            index += 1
            if index == len(pattern):
                return "it ends with a backslash"
            repeatable = True
        elif char == "[":
            end = _class_end(pattern, index)
            if end is None:
                return "a character class is not closed"
            index = end
            repeatable = True
        elif char == "(":
            depth += 1
            if depth > _MAX_NESTING:
                return f"its groups are nested more than {_MAX_NESTING} deep"
            if pattern.startswith("?", index + 1):
                index += 1  # of a group's own syntax, as in (?:
            repeatable = False
        elif char == ")":
            depth -= 1
            if depth < 0:
                return "a parenthesis is closed that was not opened"
            repeatable = True
        elif char in "*+?":
            if not repeatable:
                return f"there is nothing to repeat before {char!r}"
        else:
            repeatable = char != "|"
        index += 1
    return "a parenthesis is not closed" if depth else None


def _class_end(pattern: str, start: int) -> int | None:
    """Index of the bracket that closes the class opened at `start`."""
    index = start + 1
    if pattern.startswith("^", index):
        index += 1
    if pattern.startswith("]", index) and pattern.find("]", index + 1) > 0:
        index += 1  # in most dialects a first bracket is a member
    while index < len(pattern):
        if pattern[index] == "\0":
            return None
        if pattern[index] == "\\":
            index += 1
        elif pattern[index] == "]":
            return index
        index += 1
    return None
