"""Random walks through grammars: what a model without any sense would write under a mask."""

from pathlib import Path
from random import Random

import numpy as np

from contracts.sampling import Grammar
from engine.grammar_backends import Backends
from engine.grammar_matcher import ReadyGrammar
from engine.guide import CompiledGrammar
from engine.vocabulary import Vocabulary, load_vocabulary

VOCAB_SIZE = 2100  # the demo tokenizer's 2048, padded as models do
END = 2
CLOSING = (b'"', b"}", b"]")


class Walker:
    """Compiles in this process and walks; the demo model's tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.backends = Backends(folder, VOCAB_SIZE, (END, 0))
        self.vocabulary: Vocabulary = load_vocabulary(folder, VOCAB_SIZE)

    def compile(self, grammar: Grammar) -> tuple[str, CompiledGrammar]:
        name, source = self.backends.compile(grammar)
        return name, ReadyGrammar(self.backends.get(name).load(source), (END, 0))

    def texts(self, compiled: CompiledGrammar, count: int, limit: int = 300) -> list[str]:
        """Whole outputs of `count` walks; those that did not end within `limit` are left out."""
        found = [self.walk(compiled, Random(seed), limit) for seed in range(count)]
        return [text for text in found if text is not None]

    def walk(self, compiled: CompiledGrammar, choose: Random, limit: int = 300) -> str | None:
        matcher = compiled.matcher()
        mask = np.zeros(-(-VOCAB_SIZE // 32), dtype=np.int32)
        text = b""
        for _ in range(limit):
            matcher.fill(mask)
            bits = np.unpackbits(mask.view(np.uint8), count=VOCAB_SIZE, bitorder="little")
            allowed: list[int] = np.flatnonzero(bits).tolist()
            assert allowed, f"a dead end after {text!r}"
            if END in allowed and (len(allowed) == 2 or choose.random() < 0.5):
                assert matcher.accept(END)
                assert matcher.ended
                return text.decode()  # must be valid UTF-8
            allowed = [token for token in allowed if token not in (END, 0)]
            closing = [token for token in allowed if self.vocabulary.tokens[token] in CLOSING]
            token = choose.choice(closing if closing and choose.random() < 0.4 else allowed)
            assert self.vocabulary.tokens[token], f"token {token} is no text"
            assert matcher.accept(token)
            assert not matcher.ended
            text += self.vocabulary.tokens[token]
        return None

    def takes(self, compiled: CompiledGrammar, text: str) -> bool:
        """Whether exactly this text may be written, byte by byte, and end there."""
        single = {t: i for i, t in enumerate(self.vocabulary.tokens) if len(t) == 1}
        matcher = compiled.matcher()
        if not all(matcher.accept(single[bytes([byte])]) for byte in text.encode()):
            return False
        return matcher.accept(END)
