"""Which backend serves which grammar, and proof that the result can be used."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from contracts.errors import EngineFailure, InvalidRequest
from contracts.sampling import Grammar, GrammarKind
from engine.grammar_matcher import EndingMatcher, TextGrammar
from engine.grammar_regex import check_regex, exact_regex
from engine.grammar_schema import prepare_schema, read_json
from engine.grammar_tags import NotExact
from engine.vocabulary import Vocabulary, load_vocabulary

FIRST, SECOND = "xgrammar", "llguidance"
TRIAL_TOKENS = 48
TRIAL_S = 1.0  # all of them together
ANY_OBJECT = '{"type": "object"}'


class Backend(Protocol):
    """What each grammar backend offers."""

    def write(self, grammar: Grammar) -> bytes:
        """What `load` needs of a grammar; InvalidRequest with the reason if it cannot serve it."""
        ...

    def load(self, source: bytes) -> TextGrammar:
        """Compile it; InvalidRequest with the reason."""
        ...


class Backends:
    """Both backends for one tokenizer, each made when first needed. One thread at a time."""

    def __init__(self, path: Path, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._path = path
        self._vocab_size = vocab_size
        self._ends = tuple(end_token_ids)
        self._vocabulary: Vocabulary | None = None
        self._made: dict[str, Backend] = {}

    def get(self, name: str) -> Backend:
        """A backend by name.

        Raises:
            InvalidRequest: it is not installed, or the tokenizer is not supported.
        """
        if name not in self._made:
            if self._vocabulary is None:
                self._vocabulary = load_vocabulary(self._path, self._vocab_size)
            try:
                self._made[name] = _make(name, self._vocabulary, self._ends)
            except ImportError as error:
                raise InvalidRequest(f"this needs {name}, which is not installed") from error
        return self._made[name]

    def compile(self, grammar: Grammar) -> tuple[str, bytes]:
        """Find the first backend that is exact, compile with it, try the result out.

        Returns:
            (name of the backend, what its `load` takes): to be compiled again where it is used.

        Raises:
            InvalidRequest: no backend can enforce it, or nothing satisfies it.
        """
        name, source, text = self._compile(grammar)
        self._try(text)
        return name, source

    def _compile(self, grammar: Grammar) -> tuple[str, bytes, TextGrammar]:
        if grammar.kind is GrammarKind.LARK:
            return self._by(SECOND, grammar)
        if grammar.kind is GrammarKind.EBNF:
            return self._by(FIRST, grammar)
        if grammar.kind is GrammarKind.CHOICE:
            check_choices(grammar.text)
            return self._by(FIRST, grammar)
        first, second, reason = _forms(grammar)
        if first is not None:
            try:
                return self._by(FIRST, first)
            except NotExact as error:
                reason = str(error)
            except InvalidRequest as error:
                if grammar.kind is GrammarKind.STRUCTURAL_TAG:
                    raise
                reason = str(error)
        if not grammar.fallback:
            raise InvalidRequest(f"{reason} (another backend is ruled out by disable_fallback)")
        return self._by(SECOND, second)

    def _by(self, name: str, grammar: Grammar) -> tuple[str, bytes, TextGrammar]:
        backend = self.get(name)
        source = backend.write(grammar)
        return name, source, backend.load(source)

    def _try(self, text: TextGrammar) -> None:
        """Walk a few tokens: there must be a way to begin, and no step may take too long."""
        ends = self._ends or (0,)
        matcher = EndingMatcher(text.matcher(), ends)
        mask = np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
        choose = random.Random(0)
        started = time.monotonic()
        for step in range(TRIAL_TOKENS):
            try:
                matcher.fill(mask)
            except EngineFailure as error:
                if step == 0:
                    raise InvalidRequest("nothing can satisfy this grammar") from error
                return
            bits = np.unpackbits(mask.view(np.uint8), count=self._vocab_size, bitorder="little")
            possible = np.flatnonzero(bits)
            if step == 0 and not len(possible):
                raise InvalidRequest("nothing can satisfy this grammar")
            if time.monotonic() - started > TRIAL_S:
                raise InvalidRequest("the grammar takes too long to enforce")
            going_on = possible[~np.isin(possible, ends)]
            if not len(going_on) or not matcher.accept(int(choose.choice(going_on))):
                return


def _make(name: str, vocabulary: Vocabulary, ends: tuple[int, ...]) -> Backend:
    if name == FIRST:
        from engine.grammar_xgrammar import XGrammarBackend

        return XGrammarBackend(vocabulary, ends)
    from engine.grammar_llguidance import LLGuidanceBackend

    return LLGuidanceBackend(vocabulary, ends)


def _forms(grammar: Grammar) -> tuple[Grammar | None, Grammar, str]:
    """The grammar as the first backend must get it (None: not exact there), and as the second."""
    if grammar.kind is GrammarKind.REGEX:
        check_regex(grammar.text)
        exact = exact_regex(grammar.text)
        first = None if exact is None else replace(grammar, text=exact)
        return first, grammar, "the regular expression needs another backend"
    if grammar.kind is GrammarKind.STRUCTURAL_TAG:
        return grammar, grammar, ""
    if grammar.kind is GrammarKind.JSON_OBJECT:
        text, reason = ANY_OBJECT, ""
    else:
        prepared = prepare_schema(read_json(grammar.text), closed=grammar.closed_objects)
        text, reason = prepared.text, prepared.reason
    if grammar.whitespace_pattern and grammar.any_whitespace:
        reason = "whitespace_pattern"
    whole = replace(grammar, text=text)
    return (None if reason else whole), whole, f"{reason} needs another backend"


def check_choices(text: str) -> None:
    """Refuse what is not a list of texts that can be generated.

    Raises:
        InvalidRequest: it says what is wrong.
    """
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("the choices are not valid JSON") from error
    if not isinstance(choices, list) or not choices:
        raise InvalidRequest("the choices must be a list that is not empty")
    for one in choices:
        if not isinstance(one, str):
            raise InvalidRequest("each choice must be a text")
        if any("\ud800" <= character <= "\udfff" for character in one) or "\0" in one:
            raise InvalidRequest("a choice holds a character that cannot be generated")
