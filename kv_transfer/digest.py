"""Digests that decide whether KV may be handed over: of the prompt, and of what computes it.

Both are SHA-256 over a canonical encoding: a domain tag, then every part with its length in
front, so that no two different inputs have the same bytes.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence

_PROMPT_DOMAIN = b"baton prompt 1"
_SEMANTIC_DOMAIN = b"baton semantics 1"


def prompt_digest(
    semantic_hash: str,
    cache_salt: str,
    prompt_ids: Sequence[int],
    adapter: str = "",
    media: Sequence[tuple[str, int, int]] = (),
) -> str:
    """Digest of everything the prompt's KV depends on, in hex; independent of block size.

    Args:
        semantic_hash: of the model, see `semantic_hash`.
        cache_salt: keeps tenants apart; may be empty.
        prompt_ids: unsigned 32-bit token ids.
        adapter: adapter id and revision; empty for none.
        media: (content hash, first token, end token), in the order of the prompt.

    Raises:
        ValueError: a token id is not an unsigned 32-bit integer.
    """
    try:
        ids = struct.pack(f"<{len(prompt_ids)}I", *prompt_ids)
    except struct.error:
        raise ValueError("a token id is not an unsigned 32-bit integer") from None
    parts = [_utf8(semantic_hash), _utf8(cache_salt), _utf8(adapter)]
    parts.append(struct.pack("<Q", len(media)))
    for content_hash, start, end in media:
        parts += (_utf8(content_hash), struct.pack("<QQ", start, end))
    parts.append(ids)
    return _digest(_PROMPT_DOMAIN, parts)


def semantic_hash(parts: Mapping[str, str]) -> str:
    """Digest of what must be equal on P and D (weights, rope, quantisation, adapters, tokenizer).

    The order of `parts` does not matter. In hex.
    """
    flat = [_utf8(text) for name in sorted(parts) for text in (name, parts[name])]
    return _digest(_SEMANTIC_DOMAIN, flat)


def _utf8(text: str) -> bytes:
    """Also of lone surrogates, which JSON lets clients send."""
    return text.encode("utf-8", "surrogatepass")


def _digest(domain: bytes, parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in (domain, *parts):
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.hexdigest()
