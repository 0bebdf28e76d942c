"""A tokenizer of single bytes for the tiny models: token i + 2 is byte i, then the end token."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = 258


def add_byte_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` into a model's folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte)
    vocab = {"<unk>": 0, "<pad>": 1} | {letter: 2 + _byte(letter) for letter in letters}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    assert tokenizer.token_to_id("<end>") == END
    tokenizer.save(str(folder / "tokenizer.json"))


def text_of(token_ids: list[int]) -> str:
    """The text of tokens; the end token has none."""
    return bytes(token - 2 for token in token_ids if 2 <= token < END).decode("latin-1")


def _byte(letter: str) -> int:
    """The byte that a letter of the byte-level alphabet stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    code = ord(letter)
    return code if code in plain else others[code - 256]
