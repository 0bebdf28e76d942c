"""Token ids to text, one at a time, never half a character.

Byte-level vocabularies (GPT-2's scheme) are decoded exactly: each token is bytes, and an
incremental UTF-8 decoder holds what is incomplete. Other tokenizers go through their own decoder
over a short window, because a token's text may depend on the token before it. Either way the
work per token does not depend on how much was generated before.

Special tokens leave no text, or appear by name. Some decoders (WordPiece) put a space before each
token; between two added tokens it is kept or left out as `spaces_between_special_tokens` says.
Byte-level and SentencePiece decoders put none there, and none is invented: text is what the model
wrote, and the option changes nothing.
"""

import codecs
import json
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most four bytes, so as many tokens
_PRIMING_TOKENS = 8  # of the prompt's tail


def _byte_of_char() -> dict[str, int]:
    """GPT-2's stand-ins: a printable Latin-1 byte is itself, the others start at U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


class Detokenizer(Protocol):
    """The text of one choice."""

    def push(self, token_id: int) -> str:
        """Take the next token; return the characters that are complete now (may be empty)."""
        ...

    def peek(self, token_id: int) -> str:
        """What `push` would return, without taking the token."""
        ...

    def finish(self) -> str:
        """The end: U+FFFD for bytes that never became a character, else nothing."""
        ...


class Vocabulary:
    """What the detokenizers of all requests share: token texts, and which tokens are special."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.added_ids = frozenset(added)  # special or not
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)
        self._bytes: dict[int, bytes] = {}
        self._byte_of = _byte_of_char() if _is_byte_level(tokenizer) else None

    def name(self, token_id: int) -> str:
        """The token as the vocabulary writes it; empty for an unknown id."""
        return self.tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token of a byte-level vocabulary (special tokens too); cached."""
        known = self._bytes.get(token_id)
        if known is None:
            assert self._byte_of is not None
            name, table = self.name(token_id), self._byte_of
            if all(char in table for char in name):
                known = bytes(table[char] for char in name)
            else:  # an added token with characters outside of the scheme stands for itself
                known = name.encode()
            self._bytes[token_id] = known
        return known

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids, all at once."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(
        self,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> Detokenizer:
        """A fresh one, primed with the prompt's tail."""
        hidden = self.special_ids if skip_special_tokens else frozenset[int]()
        tail = [i for i in prompt_ids[-2 * _PRIMING_TOKENS :] if i not in hidden]
        tail = tail[-_PRIMING_TOKENS:]
        if self._byte_of is not None:
            return _ByteDetokenizer(self, hidden, tail)
        joined = frozenset[int]() if spaces_between_special_tokens else self.added_ids
        return _WindowDetokenizer(self, hidden, joined, tail)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = tokenizer.decoder
    if decoder is None:
        return False
    state: dict[str, object] = json.loads(decoder.__getstate__())
    if state.get("type") == "Sequence":
        parts = state.get("decoders")
        return isinstance(parts, list) and [p.get("type") for p in parts] == ["ByteLevel"]
    return state.get("type") == "ByteLevel"


class _ByteDetokenizer:
    """An incremental UTF-8 decoder; invalid bytes become U+FFFD as soon as that is sure."""

    __slots__ = ("_decoder", "_hidden", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, hidden: frozenset[int], tail: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in tail:
            self._decoder.decode(vocabulary.token_bytes(token_id))

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        return self._decoder.decode(self._vocabulary.token_bytes(token_id))

    def peek(self, token_id: int) -> str:
        state = self._decoder.getstate()
        text = self.push(token_id)
        self._decoder.setstate(state)
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class _WindowDetokenizer:
    """The tokenizer's own decoder over [`_context`, `_pending`]; `_context` was shown already.

    Of two tokens in `joined` that follow each other, the second is shown by its bare name.
    """

    __slots__ = ("_context", "_hidden", "_joined", "_pending", "_vocabulary")

    def __init__(
        self,
        vocabulary: Vocabulary,
        hidden: frozenset[int],
        joined: frozenset[int],
        tail: Sequence[int],
    ) -> None:
        self._vocabulary = vocabulary
        self._hidden = hidden
        self._joined = joined
        self._context = list(tail)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        text, held = self._next(token_id)
        if token_id not in self._hidden:
            self._pending.append(token_id)
            if not held:
                self._shown()
        return text

    def peek(self, token_id: int) -> str:
        return self._next(token_id)[0]

    def finish(self) -> str:
        text = self._text(self._pending) if self._pending else ""
        self._shown()
        return text

    def _next(self, token_id: int) -> tuple[str, bool]:
        """What the token adds to the text, and whether that is held back."""
        if token_id in self._hidden:
            return "", False
        after_joined = not self._pending and self._context and self._context[-1] in self._joined
        if after_joined and token_id in self._joined:
            return self._vocabulary.name(token_id), False
        pending = [*self._pending, token_id]
        text = self._text(pending)
        held = text.endswith(_REPLACEMENT) and len(pending) < _MAX_CHARACTER_TOKENS
        return "" if held else text, held

    def _text(self, pending: Sequence[int]) -> str:
        decode = self._vocabulary.decode
        before = decode(self._context) if self._context else ""
        return decode([*self._context, *pending])[len(before) :]

    def _shown(self) -> None:
        if self._pending:
            self._context, self._pending = self._pending, []
