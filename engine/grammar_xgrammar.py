"""Grammars by xgrammar: the fast backend, exact for the common part of each language."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray

from contracts.errors import EngineFailure, InvalidRequest
from contracts.sampling import Grammar, GrammarKind
from engine.grammar_matcher import TextMatcher, clear
from engine.grammar_tags import prepare_tags
from engine.vocabulary import Vocabulary

COMPILER_THREADS = 2
NO_TEXT = b"\xff"  # never in UTF-8
SMALL, MIDDLE = 4096, 32768  # characters of a schema
PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")


class XGrammarBackend:
    """Grammars for one vocabulary. Any thread may use it."""

    def __init__(self, vocabulary: Vocabulary, end_token_ids: Sequence[int]) -> None:
        # xgrammar wants one id that ends texts; it is never a text itself.
        stop = next((t for t in end_token_ids if not vocabulary.tokens[t]), None)
        if stop is None:
            stop = next((t for t, text in enumerate(vocabulary.tokens) if not text), None)
        if stop is None:
            raise InvalidRequest("structured output needs a tokenizer with special tokens")
        # A special token gets a name that no text matches, for formats that name tokens.
        texts = list(vocabulary.tokens)
        for name, token in vocabulary.special.items():
            texts[token] = NO_TEXT + name.encode()
        self._stop = stop
        self._tokenizer = xgrammar.TokenizerInfo(
            texts, xgrammar.VocabType.RAW, vocab_size=len(texts), stop_token_ids=[stop]
        )
        self._special = vocabulary.special
        self._compiler = xgrammar.GrammarCompiler(
            self._tokenizer, max_threads=COMPILER_THREADS, cache_enabled=False
        )

    def write(self, grammar: Grammar) -> bytes:
        """What `load` needs of a grammar whose text is in the form that xgrammar matches exactly.

        Raises:
            InvalidRequest: it is no structural tag.
            NotExact: one of its schemas needs the other backend.
        """
        source: dict[str, Any] = {"kind": grammar.kind.value, "text": grammar.text}
        if grammar.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT):
            source["kind"] = GrammarKind.JSON_SCHEMA.value
            source["space"] = longest_space(grammar.text) if grammar.any_whitespace else None
        elif grammar.kind is GrammarKind.CHOICE:
            choices: list[str] = json.loads(grammar.text)
            source["kind"] = GrammarKind.EBNF.value
            source["text"] = "root ::= " + " | ".join(literal(choice) for choice in choices)
        elif grammar.kind is GrammarKind.STRUCTURAL_TAG:
            source["text"] = prepare_tags(
                grammar.text, closed=grammar.closed_objects, special=self._special
            )
        return json.dumps(source).encode()

    def load(self, source: bytes) -> "XGrammarText":
        """Compile what `write` gave; it lets other threads run.

        Compiling again is faster than any transport of the result: 30 ms against 300 ms, and
        0.7 s against 3 s and a gigabyte, at 150 k tokens.

        Raises:
            InvalidRequest: xgrammar's reason, in one line.
        """
        try:
            return XGrammarText(self._compile(json.loads(source)), self._stop)
        except (RuntimeError, ValueError, TypeError) as error:
            raise InvalidRequest(one_line(str(error))) from error

    def _compile(self, source: dict[str, Any]) -> Any:
        kind, text = GrammarKind(source["kind"]), source["text"]
        if kind is GrammarKind.JSON_SCHEMA:
            spaced = source["space"] is not None
            return self._compiler.compile_json_schema(
                text,
                any_whitespace=spaced,
                separators=None if spaced else (",", ":"),
                strict_mode=False,  # closed where it should be already
                max_whitespace_cnt=source["space"],
            )
        if kind is GrammarKind.REGEX:
            return self._compiler.compile_regex(text)
        if kind is GrammarKind.STRUCTURAL_TAG:
            return self._compiler.compile_structural_tag(text)
        return self._compiler.compile_grammar(text)


class XGrammarText:
    """A loaded grammar."""

    def __init__(self, compiled: Any, stop: int) -> None:
        self._compiled = compiled
        self._stop = stop

    @property
    def num_bytes(self) -> int:
        """About how much memory it holds."""
        return int(self._compiled.memory_size_bytes)

    def matcher(self) -> TextMatcher:
        """A state at the beginning."""
        return _Matcher(xgrammar.GrammarMatcher(self._compiled), self._stop)


class _Matcher:
    def __init__(self, matcher: Any, stop: int) -> None:
        self._matcher = matcher
        self._stop = stop

    def fill(self, bitmask: NDArray[np.int32]) -> None:
        try:
            self._matcher.fill_next_token_bitmask(bitmask.reshape(1, -1))
        except RuntimeError as error:
            raise EngineFailure("the grammar cannot be followed any further") from error
        clear(bitmask, (self._stop,))

    def accept(self, token_id: int) -> bool:
        return token_id != self._stop and bool(self._matcher.accept_token(token_id))

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_completed())


def longest_space(schema: str) -> int:
    """The cap for runs of white space. Each further character is one more state at each place."""
    return 16 if len(schema) < SMALL else 8 if len(schema) < MIDDLE else 4


def literal(text: str) -> str:
    """`text` as a literal of the grammar language, exact for every character."""
    return '"' + "".join(_character(one) for one in text) + '"'


def _character(one: str) -> str:
    if one.isascii() and one.isprintable() and one not in '"\\':
        return one
    return f"\\U{ord(one):08x}" if ord(one) > 0xFFFF else f"\\u{ord(one):04x}"


def one_line(message: str) -> str:
    """A backend's reason without its source places and stack."""
    first = next((line for line in message.splitlines() if line.strip()), "no reason given")
    return PLACE.sub("", first).strip()[:300]
