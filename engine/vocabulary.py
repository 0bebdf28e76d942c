"""The bytes that each token id stands for, read from a model's tokenizer files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import InvalidRequest

BYTES = 256
SPACE = "\u2581"  # how sentencepiece writes a space


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`tokens[i]` is what token i adds to the text; empty for special and unused ids.

    It is as long as the model's logits are wide. `special` has the ids of special tokens by name.
    """

    tokens: tuple[bytes, ...]
    special: dict[str, int]


def load_vocabulary(path: Path, vocab_size: int) -> Vocabulary:
    """Read tokenizer.json, and added tokens from tokenizer_config.json.

    Args:
        path: the model's folder, or its tokenizer.json.
        vocab_size: width of the logits; ids beyond it do not exist, those without a token
            are unused.

    Raises:
        InvalidRequest: there is no tokenizer.json, or none that is understood.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InvalidRequest("structured output needs tokenizer.json")
    try:
        return _read(file, vocab_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest("structured output cannot read this model's tokenizer") from error


def _read(file: Path, vocab_size: int) -> Vocabulary:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    decode = _decoding(content)
    tokens = [b""] * vocab_size
    for token, index in _pieces(content["model"]):
        if index < vocab_size:
            tokens[index] = decode(token)
    special: dict[str, int] = {}
    for index, name, is_special in _added(content, file.with_name("tokenizer_config.json")):
        if index < vocab_size:
            tokens[index] = b"" if is_special else name.encode("utf-8", "replace")
            if is_special:
                special[name] = index
    return Vocabulary(tuple(tokens), special)


def _pieces(model: dict[str, Any]) -> list[tuple[str, int]]:
    pieces = model["vocab"]
    if isinstance(pieces, dict):
        return list(pieces.items())
    return [(piece[0], index) for index, piece in enumerate(pieces)]  # Unigram: (piece, score)


def _added(content: dict[str, Any], config: Path) -> list[tuple[int, str, bool]]:
    found = [
        (int(one["id"]), str(one["content"]), bool(one.get("special")))
        for one in content.get("added_tokens") or []
    ]
    if config.is_file():
        more = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder") or {}
        found += [
            (int(index), str(one["content"]), bool(one.get("special")))
            for index, one in more.items()
        ]
    return found


class _ByteLevel:
    """Each character stands for one byte (GPT-2's alphabet)."""

    def __init__(self) -> None:
        kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        shifted = [byte for byte in range(BYTES) if byte not in set(kept)]
        self._bytes = {chr(byte): byte for byte in kept}
        self._bytes |= {chr(BYTES + place): byte for place, byte in enumerate(shifted)}

    def __call__(self, token: str) -> bytes:
        try:
            return bytes([self._bytes[character] for character in token])
        except KeyError:  # text that was added as it is
            return token.encode("utf-8", "replace")


class _ByteFallback:
    """Text with a sign for the space, and single bytes as <0x41>."""

    def __init__(self) -> None:
        self._bytes = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(BYTES)}

    def __call__(self, token: str) -> bytes:
        byte = self._bytes.get(token)
        return token.replace(SPACE, " ").encode("utf-8", "replace") if byte is None else byte


def _decoding(content: dict[str, Any]) -> _ByteLevel | _ByteFallback:
    decoder = content.get("decoder") or {}
    parts = decoder.get("decoders") or [decoder]
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return _ByteLevel()
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return _ByteFallback()
    raise InvalidRequest("structured output does not support this model's tokenizer")
