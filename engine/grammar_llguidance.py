"""Grammars by llguidance: wide cover of JSON schema and regular expressions, and Lark."""

import json
import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from contracts.errors import EngineFailure, InvalidRequest
from contracts.sampling import Grammar, GrammarKind
from engine.grammar_matcher import TextMatcher, clear
from engine.grammar_tags import simple_tags
from engine.vocabulary import Vocabulary

WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,16}"
ESCAPES = '"\\bfnrt'  # one way to write each text, so that a known name cannot come in disguise
MAX_LEXER_STATES = 50_000
BASE_BYTES = 8 << 20  # what a grammar's automata may grow to, roughly


class LLGuidanceBackend:
    """Grammars for one vocabulary. Any thread may use it."""

    def __init__(self, vocabulary: Vocabulary, end_token_ids: Sequence[int]) -> None:
        ends = (
            [*end_token_ids] or [*vocabulary.special.values()][:1] or [len(vocabulary.tokens) - 1]
        )
        self._tokenizer = llguidance.LLTokenizer(
            _Tokens(vocabulary, ends), n_vocab=len(vocabulary.tokens), eos_token=ends
        )
        self._ends = tuple(ends)
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=MAX_LEXER_STATES, verbose_errors=False
        )

    def write(self, grammar: Grammar) -> bytes:
        """The grammar in llguidance's own language.

        Raises:
            InvalidRequest: it cannot be written in it.
        """
        try:
            return self._source(grammar).encode()
        except ValueError as error:
            raise InvalidRequest(str(error).splitlines()[0][:300]) from error

    def _source(self, grammar: Grammar) -> str:
        options: dict[str, Any] = {"whitespace_flexible": grammar.any_whitespace}
        if grammar.any_whitespace:
            options["whitespace_pattern"] = grammar.whitespace_pattern or WHITE_SPACE
        options["json_allowed_escapes"] = ESCAPES
        make = llguidance.LLMatcher
        if grammar.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT):
            return str(make.grammar_from_json_schema(grammar.text, overrides=options))
        if grammar.kind is GrammarKind.REGEX:
            return str(make.grammar_from_regex(grammar.text))
        if grammar.kind is GrammarKind.LARK:
            return str(make.grammar_from_lark(grammar.text))
        if grammar.kind is GrammarKind.STRUCTURAL_TAG:
            tags = simple_tags(grammar.text, closed=grammar.closed_objects)
            return str(make.grammar_from_lark(_tags_as_lark(tags, options)))
        raise InvalidRequest(f"no backend serves this {grammar.kind.value}")

    def load(self, source: bytes) -> "LLGuidanceText":
        """Compile what `write` gave.

        Raises:
            InvalidRequest: llguidance's reason, in one line.
        """
        first = llguidance.LLMatcher(
            self._tokenizer, source.decode(), log_level=0, limits=self._limits
        )
        if first.is_error():
            raise InvalidRequest(_reason(first.get_error()))
        return LLGuidanceText(first, len(source), self._ends)


class LLGuidanceText:
    """A loaded grammar: a matcher at the beginning, never moved, to be copied."""

    def __init__(self, first: Any, num_chars: int, ends: tuple[int, ...]) -> None:
        self._ends = ends
        self._first = first
        self._num_chars = num_chars
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """About how much memory it holds."""
        return BASE_BYTES + 16 * self._num_chars

    def matcher(self) -> TextMatcher:
        """A state at the beginning."""
        with self._lock:
            return _Matcher(self._first.deep_copy(), self._ends)


class _Matcher:
    def __init__(self, matcher: Any, ends: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._ends = ends

    def fill(self, bitmask: NDArray[np.int32]) -> None:
        self._matcher.unsafe_compute_mask_ptr(bitmask.ctypes.data, bitmask.nbytes)
        if self._matcher.is_error():
            raise EngineFailure("the grammar became too complex to follow")
        clear(bitmask, self._ends)

    def accept(self, token_id: int) -> bool:
        if token_id in self._ends:
            return False
        return bool(self._matcher.try_consume_tokens([token_id]) == 1)

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_accepting())


class _Tokens:
    """A vocabulary in the form that llguidance reads."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary, ends: list[int]) -> None:
        names = {index: name.encode() for name, index in vocabulary.special.items()}
        tokens = vocabulary.tokens
        self.tokens = [text or names.get(index, b"") for index, text in enumerate(tokens)]
        for end in ends:
            self.tokens[end] = names.get(end) or b"<end-%d>" % end
        self.special_token_ids = sorted({*names, *ends})
        self.eos_token_id = ends[0]
        self.bos_token_id = None
        self._single = {text[0]: index for index, text in enumerate(tokens) if len(text) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self._single[byte] for byte in data if byte in self._single]


def _tags_as_lark(
    groups: list[tuple[str, list[tuple[str, str, str]]]], options: dict[str, Any]
) -> str:
    """Free text up to a trigger, then one of its tags, again and again."""
    lines = ["%llguidance {}", "start: part* rest", r"rest: /(.|\n)*/"]
    lines.append("part: " + " | ".join(f"part_{index}" for index in range(len(groups))))
    for index, (trigger, tags) in enumerate(groups):
        lines.append(f"head_{index}[lazy]: /(.|\\n)*/ {json.dumps(trigger)}")
        if not tags:
            raise InvalidRequest(f"no tag starts with the trigger {json.dumps(trigger)}")
        bodies = [
            f"{_text(begin[len(trigger) :])} %json {_with_options(schema, options)} {_text(end)}"
            for begin, schema, end in tags
        ]
        names = [f"tag_{index}_{place}" for place in range(len(tags))]
        lines.append(f"part_{index}: head_{index} ({' | '.join(names)})")
        lines += [f"{name}: {body}" for name, body in zip(names, bodies, strict=True)]
    return "\n".join(lines)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _with_options(schema: str, options: dict[str, Any]) -> str:
    content = json.loads(schema)
    if not isinstance(content, dict):
        content = {"allOf": [content]}
    return json.dumps(content | {"x-guidance": options})


def _reason(message: str) -> str:
    if "oneOf" in message:
        return "'oneOf' whose parts overlap is not supported; use 'anyOf'"
    plain = " ".join(message.split()).partition(" 1 | ")[0]  # what follows quotes the grammar
    return plain[:300] or "no reason given"
