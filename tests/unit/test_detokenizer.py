import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from router.detokenizer import Vocabulary
from tests.support.fake_worker import byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()


def byte_fallback_tokenizer() -> Tokenizer:
    """As SentencePiece models have it: `▁` for spaces, `<0x..>` for bytes, first space stripped."""
    vocabulary = {"<unk>": 0}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for text in ("▁", "▁the", "▁cat", "s", "a", "t", "é", "▁é", "."):
        vocabulary[text] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


BYTE_FALLBACK = byte_fallback_tokenizer()


def word_piece_tokenizer(decoder: decoders.Decoder | None) -> Tokenizer:
    """Every token gets a space before it, special ones too; `in` and `##g` are one word."""
    words = ("[UNK]", "the", "cat", "in", "##g", "é")
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("[SEP]", "[CLS]")])
    tokenizer.add_tokens([AddedToken("<call>", special=False)])
    return tokenizer


WORD_PIECE = word_piece_tokenizer(decoders.WordPiece(cleanup=False))
NO_DECODER = word_piece_tokenizer(None)
TAGGED = byte_level_tokenizer()
TAGGED.add_tokens([AddedToken("<call>", special=False)])


def deltas(
    tokenizer: Tokenizer, ids: Sequence[int], prompt_ids: Sequence[int] = (), **options: bool
) -> list[str]:
    detokenizer = Vocabulary(tokenizer).detokenizer(prompt_ids, **options)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token a byte."""
    if tokenizer is BYTE_FALLBACK:
        names = [f"<0x{byte:02X}>" for byte in data]
    else:
        alphabet = byte_alphabet()
        names = [alphabet[byte] for byte in data]
    return [token_id(tokenizer, name) for name in names]


def token_id(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.token_to_id(name)
    assert found is not None, name
    return found


def byte_alphabet() -> dict[int, str]:
    """Byte to stand-in, asked of the tokenizers library itself."""
    table: dict[int, str] = {}
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for code in [*range(0x80), *range(0x80, 0x800), *range(0x1000, 0x11000, 0x1000)]:
        char = chr(code) if not 0xD800 <= code < 0xE000 else "x"
        table.update(zip(char.encode(), split.pre_tokenize_str(char)[0][0], strict=True))
    for code in (0x40000, 0x80000, 0xC0000, 0x100000):
        char = chr(code)
        table.update(zip(char.encode(), split.pre_tokenize_str(char)[0][0], strict=True))
    return table


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=60))
def test_deltas_of_any_tokens_join_to_the_decoding_of_all(ids: list[int]) -> None:
    assert "".join(deltas(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, TAGGED.get_vocab_size() + 3), max_size=60), st.booleans())
def test_with_special_tokens_shown_deltas_join_too(ids: list[int], spaces: bool) -> None:
    shown = deltas(TAGGED, ids, skip_special_tokens=False, spaces_between_special_tokens=spaces)
    assert "".join(shown) == TAGGED.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("tokenizer", [WORD_PIECE, NO_DECODER], ids=["wordpiece", "no decoder"])
@given(st.lists(st.integers(0, WORD_PIECE.get_vocab_size() - 1), max_size=30), st.booleans())
def test_spaced_tokenizers_deltas_join(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    joined = "".join(deltas(tokenizer, ids, skip_special_tokens=skip))
    assert joined == tokenizer.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.sampled_from(["</s>", "▁the", "▁cat", "s", "é"]), max_size=30))
def test_sentencepiece_with_special_tokens_shown(names: list[str]) -> None:
    ids = [token_id(BYTE_FALLBACK, name) for name in names]
    joined = "".join(deltas(BYTE_FALLBACK, ids, skip_special_tokens=False))
    assert joined == BYTE_FALLBACK.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("tokenizer", "names", "kept", "left_out"),
    [
        (
            WORD_PIECE,
            ["[SEP]", "[CLS]", "the", "[SEP]", "<call>", "<call>", "in", "##g"],
            "[SEP] [CLS] the [SEP] <call> <call> ing",
            "[SEP][CLS] the [SEP]<call><call> ing",
        ),
        (TAGGED, ["<call>", "<|im_end|>", "a", "<call>"], "<call><|im_end|>a<call>", None),
        (BYTE_FALLBACK, ["s", "</s>", "</s>", "▁the"], "s</s></s> the", None),
    ],
    ids=["wordpiece", "bytes", "fallback"],
)
def test_spaces_between_special_tokens(
    tokenizer: Tokenizer, names: list[str], kept: str, left_out: str | None
) -> None:
    ids = [token_id(tokenizer, name) for name in names]
    for spaces, text in ((True, kept), (False, left_out or kept)):
        options: dict[str, Any] = {"skip_special_tokens": False}
        options["spaces_between_special_tokens"] = spaces
        assert "".join(deltas(tokenizer, ids, **options)) == text
        for cut in range(1, len(ids)):  # the prompt's last token counts as the one before
            rest = "".join(deltas(tokenizer, ids[cut:], ids[:cut], **options))
            assert text.endswith(rest)
            assert text.startswith("".join(deltas(tokenizer, ids[:cut], **options)) + rest[:1])


def test_added_tokens_that_are_not_special_are_always_shown() -> None:
    ids = [token_id(TAGGED, name) for name in ("<|im_start|>", "<call>", "a", "<|im_end|>")]
    assert "".join(deltas(TAGGED, ids)) == "<call>a"


@given(st.text(max_size=40), st.text(max_size=20))
def test_deltas_join_to_the_text(text: str, prompt: str) -> None:
    ids = BYTE_LEVEL.encode(text).ids
    assert "".join(deltas(BYTE_LEVEL, ids, BYTE_LEVEL.encode(prompt).ids)) == text


@given(st.text(alphabet="the cats .é€🙂", max_size=40), st.sampled_from(["", "the", "é"]))
def test_sentencepiece_deltas_join_to_the_decoding_after_the_prompt(text: str, prompt: str) -> None:
    def encode(words: str) -> list[int]:
        return BYTE_FALLBACK.encode(words.replace(" ", "▁")).ids

    before, ids = encode(prompt), encode(text)
    whole = BYTE_FALLBACK.decode(before + ids)
    assert "".join(deltas(BYTE_FALLBACK, ids, before)) == whole[len(BYTE_FALLBACK.decode(before)) :]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["bytes", "fallback"])
@pytest.mark.parametrize("char", ["é", "€", "🙂"])
def test_a_character_comes_whole_with_its_last_byte(tokenizer: Tokenizer, char: str) -> None:
    ids = byte_ids(tokenizer, char.encode())
    assert deltas(tokenizer, ids) == [""] * (len(ids) - 1) + [char, ""]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["bytes", "fallback"])
def test_half_a_character_at_the_end_becomes_a_replacement(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "€".encode()[:2])
    assert "".join(deltas(tokenizer, ids)[:-1]) == ""
    assert set(deltas(tokenizer, ids)[-1]) == {"\ufffd"}


def test_a_byte_that_cannot_be_completed_is_shown_at_once() -> None:
    ids = byte_ids(BYTE_LEVEL, b"\xe2\x82A")
    assert deltas(BYTE_LEVEL, ids) == ["", "", "\ufffdA", ""]
    assert deltas(BYTE_LEVEL, byte_ids(BYTE_LEVEL, b"\x80"))[0] == "\ufffd"


def test_bytes_that_never_become_text_are_not_held_for_ever() -> None:
    ids = byte_ids(BYTE_FALLBACK, b"\xe2" * 40)
    shown = deltas(BYTE_FALLBACK, ids)
    assert "".join(shown[:8]) != ""
    assert "".join(shown) == "\ufffd" * 40


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["bytes", "fallback"])
def test_special_tokens_leave_no_text_and_do_not_disturb_a_character(tokenizer: Tokenizer) -> None:
    special = min(Vocabulary(tokenizer).special_ids)
    a, b = byte_ids(tokenizer, "é".encode())
    assert "".join(deltas(tokenizer, [special, a, special, b, special])) == "é"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["bytes", "fallback"])
def test_peek_foretells_push_and_changes_nothing(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    detokenizer = Vocabulary(tokenizer).detokenizer([])
    for _ in range(200):
        chosen = rng.randrange(tokenizer.get_vocab_size())
        detokenizer.peek(rng.randrange(tokenizer.get_vocab_size()))
        foretold = detokenizer.peek(chosen)
        assert detokenizer.push(chosen) == foretold


def test_the_first_token_keeps_its_space_after_a_prompt() -> None:
    cat, the = token_id(BYTE_FALLBACK, "▁cat"), token_id(BYTE_FALLBACK, "▁the")
    assert deltas(BYTE_FALLBACK, [cat], [the])[0] == " cat"
    assert deltas(BYTE_FALLBACK, [cat])[0] == "cat"


def test_window_does_not_grow_with_the_output() -> None:
    class Counting:
        """The real tokenizer, noting how many ids each decode gets."""

        def __init__(self) -> None:
            self.most = 0

        def __getattr__(self, name: str) -> object:
            return getattr(BYTE_FALLBACK, name)

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            self.most = max(self.most, len(ids))
            return BYTE_FALLBACK.decode(ids, skip_special_tokens=skip_special_tokens)

    counting = Counting()
    vocabulary = Vocabulary(BYTE_FALLBACK)
    vocabulary.tokenizer = counting  # type: ignore[assignment]
    detokenizer = vocabulary.detokenizer(list(range(1, 200)))
    rng = random.Random(2)
    for _ in range(500):
        detokenizer.push(rng.randrange(1, BYTE_FALLBACK.get_vocab_size()))
    assert counting.most <= 12
