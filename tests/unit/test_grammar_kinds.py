"""All other kinds of grammars, by the real backends: only what fits is generated, and it ends."""

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from cluster.demo_model import ensure_demo_model
from contracts.errors import InvalidRequest
from contracts.sampling import Grammar, GrammarKind, SamplingParams
from engine.grammar_backends import Backends
from engine.grammar_matcher import ReadyGrammar
from engine.grammar_regex import exact_regex
from engine.guide import Guide
from engine.plan import SampleSlot
from engine.sampler import sample
from engine.sampling_state import SamplingStates
from engine.vocabulary import load_vocabulary
from tests.support.grammar_walks import END, VOCAB_SIZE, Walker

CHOICES = ["yes", "yes and no", 'quo"te\\', "a|b(c)*", "\n\té\U0001f600", "root ::= x", " "]
REGEXES = [
    r"[a-z]+@\w{1,5}\.(com|org)",
    r"^a.c$",
    r"(?i)abc",
    r"(^a|b$)",
    r"\d{3}-\D",
    r"[^\s]{2}!",
    r'"\\[\]"]',
    r"(a|)b?",
    r"\Ax+\Z",
    "é[😀-😂]*",
]


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    return Walker(ensure_demo_model(tmp_path_factory.mktemp("models") / "demo"))


@pytest.mark.parametrize("pattern", REGEXES)
def test_the_whole_output_matches_the_regex(walker: Walker, pattern: str) -> None:
    _, compiled = walker.compile(Grammar(GrammarKind.REGEX, pattern))
    texts = walker.texts(compiled, 15)
    assert texts
    assert [text for text in texts if not re.fullmatch(pattern, text)] == []


def test_a_dot_is_no_newline_and_anchors_are_edges(walker: Walker) -> None:
    _, compiled = walker.compile(Grammar(GrammarKind.REGEX, "^a.c$"))
    assert walker.takes(compiled, "a\u2028c")
    for text in ("a\nc", "xabc", "abcx", "ab"):
        assert not walker.takes(compiled, text)


@pytest.mark.parametrize(
    ("pattern", "exact"),
    [
        (r"^a.c$", r"a[^\n]c"),
        (r"a\$", r"a\$"),
        (r"a\\$", r"a\\"),
        (r"^a|b$", None),  # the anchors bind only one side
        (r"a^b", None),
        (r"(?i)a", None),
        (r"\D", None),  # of all alphabets, not of ASCII
        (r"[^\d]", None),
        (r"[a-z&&[b]]", None),
        (r"a++", None),
        (r"\bx", None),
        (r"(", None),
    ],
)
def test_what_the_first_backend_gets_of_a_regex(pattern: str, exact: str | None) -> None:
    assert exact_regex(pattern) == exact


def test_a_choice_is_exact(walker: Walker) -> None:
    _, compiled = walker.compile(Grammar(GrammarKind.CHOICE, json.dumps(CHOICES)))
    assert set(walker.texts(compiled, 150)) == set(CHOICES)
    assert all(walker.takes(compiled, one) for one in CHOICES)
    assert not walker.takes(compiled, "yes and")


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        (GrammarKind.EBNF, 'root ::= "[" item ("," item)* "]"\nitem ::= [0-9]+', r"\[\d+(,\d+)*\]"),
        (GrammarKind.LARK, 'start: "<" WORD ">"\nWORD: /[a-z]{2,4}/', r"<[a-z]{2,4}>"),
    ],
)
def test_context_free_grammars(walker: Walker, kind: GrammarKind, text: str, pattern: str) -> None:
    _, compiled = walker.compile(Grammar(kind, text))
    texts = walker.texts(compiled, 15)
    assert texts
    assert [one for one in texts if not re.fullmatch(pattern, one)] == []


def tag(schema: object, begin: str = "<call=f>") -> str:
    structure = {"begin": begin, "schema": schema, "end": "</call>"}
    return json.dumps({"structures": [structure], "triggers": ["<call="]})


INTEGER = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
PATTERN = {
    "type": "object",
    "properties": {"x": {"type": "string", "pattern": "^[0-9]+$"}},
    "required": ["x"],
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [(INTEGER, '{"x": 1}', '{"x": "1"}'), (PATTERN, '{"x": "1"}', '{"x": "a"}')],
    ids=["first backend", "second backend"],
)
def test_tagged_parts_follow_their_schema(
    walker: Walker, schema: object, good: str, bad: str
) -> None:
    _, compiled = walker.compile(Grammar(GrammarKind.STRUCTURAL_TAG, tag(schema)))
    for free in ("", "Let me see <b>.\n"):
        assert walker.takes(compiled, free)
        assert walker.takes(compiled, f"{free}<call=f>{good}</call>{free}")
        assert not walker.takes(compiled, f"{free}<call=f>{bad}</call>")
        assert not walker.takes(compiled, f"{free}<call=g>{good}</call>")
        assert not walker.takes(compiled, f"{free}<call=f>{good}")
    calls = "<call=f>" + good + "</call>"
    assert walker.takes(compiled, f"{calls} and {calls}")


def test_the_newer_form_of_tags(walker: Walker) -> None:
    content = {"type": "json_schema", "json_schema": INTEGER}
    text = {"format": {"type": "tag", "begin": "A", "content": content, "end": "Z"}}
    _, compiled = walker.compile(Grammar(GrammarKind.STRUCTURAL_TAG, json.dumps(text)))
    assert walker.takes(compiled, 'A{"x": 1}Z')
    assert not walker.takes(compiled, 'A{"x": 1, "y": 2}Z'), "closed as other schemas"
    assert not walker.takes(compiled, 'bA{"x": 1}Z')
    named = {"type": "token", "token": "<|im_start|>"}
    text = {"format": {"type": "tag", "begin": named, "content": content, "end": "Z"}}
    _, compiled = walker.compile(Grammar(GrammarKind.STRUCTURAL_TAG, json.dumps(text)))
    mask = np.zeros(-(-VOCAB_SIZE // 32), dtype=np.int32)
    compiled.matcher().fill(mask)
    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist() == [1]


BAD: list[tuple[GrammarKind, str, str]] = [
    (GrammarKind.REGEX, "(", "unclosed"),
    (GrammarKind.REGEX, r"(a)\1", "backreference"),
    (GrammarKind.REGEX, "(?=a)", "look-ahead"),
    (GrammarKind.REGEX, "a\0", "NUL"),
    (GrammarKind.REGEX, r"a\x00", "NUL"),
    (GrammarKind.REGEX, "a" * 40_000, "characters"),
    (GrammarKind.REGEX, "[^\\s\\S]", "nothing can satisfy"),
    (GrammarKind.CHOICE, "[]", "empty"),
    (GrammarKind.CHOICE, "[1]", "text"),
    (GrammarKind.CHOICE, '["\\ud800"]', "character"),
    (GrammarKind.EBNF, 'root ::= "a" nope', "nope"),
    (GrammarKind.EBNF, 'rot ::= "a"', "root"),
    (GrammarKind.EBNF, "root ::= root", "nothing can satisfy"),
    (GrammarKind.LARK, "start: nope", "nope"),
    (GrammarKind.LARK, "what", ""),
    (GrammarKind.STRUCTURAL_TAG, "{}", "structures"),
    (GrammarKind.STRUCTURAL_TAG, "[]", "object"),
    (GrammarKind.STRUCTURAL_TAG, '{"format": {"type": "nope"}}', "nope"),
    (GrammarKind.STRUCTURAL_TAG, tag({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (GrammarKind.STRUCTURAL_TAG, tag(INTEGER, begin="<other>"), "trigger"),
    (GrammarKind.STRUCTURAL_TAG, tag(PATTERN, begin="<other>"), "trigger"),
]


@pytest.mark.parametrize(("kind", "text", "reason"), BAD, ids=lambda x: str(x)[:40])
def test_bad_ones_are_refused_in_one_line(
    walker: Walker, kind: GrammarKind, text: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        walker.compile(Grammar(kind, text))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert ".cc" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GrammarKind.REGEX, r"(.|\n)*"),
        (GrammarKind.EBNF, r"root ::= [^\0]* | [\x00-\xff]*"),
        (GrammarKind.LARK, r'start: /(.|\n)*/ "x"?'),
    ],
)
def test_special_and_padded_tokens_are_never_text(
    walker: Walker, kind: GrammarKind, text: str
) -> None:
    _, compiled = walker.compile(Grammar(kind, text))
    mask = np.zeros(-(-VOCAB_SIZE // 32), dtype=np.int32)
    matcher = compiled.matcher()
    matcher.fill(mask)
    allowed = np.flatnonzero(
        np.unpackbits(mask.view(np.uint8), count=VOCAB_SIZE, bitorder="little")
    )
    assert set(allowed.tolist()) - set(range(3, 2048)) == {0, END}, "the end tokens"
    assert len(allowed) > 1500
    for token in (1, 2048, VOCAB_SIZE - 1, VOCAB_SIZE + 999):
        assert not matcher.accept(token)


def test_the_end_tokens_are_the_requests_own(walker: Walker) -> None:
    name, source = walker.backends.compile(Grammar(GrammarKind.CHOICE, '["a"]'))
    matcher = ReadyGrammar(walker.backends.get(name).load(source), (1, 40)).matcher()
    letter = walker.vocabulary.tokens.index(b"a")
    mask = np.zeros(-(-VOCAB_SIZE // 32), dtype=np.int32)

    def allowed() -> list[int]:
        matcher.fill(mask)
        found: list[int] = np.flatnonzero(
            np.unpackbits(mask.view(np.uint8), bitorder="little")
        ).tolist()
        return found

    assert allowed() == [letter]
    assert not matcher.accept(1)
    assert matcher.accept(letter)
    assert allowed() == [1, 40]
    assert not matcher.accept(END)
    assert matcher.accept(40)
    assert matcher.ended
    assert not matcher.accept(1)
    assert allowed() == []


def tokenizer(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


SENTENCEPIECE = [
    "<unk>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁yes",
    "y",
    "▁",
    "é",
]


@pytest.mark.parametrize("model", ["BPE", "Unigram"])
def test_tokens_with_byte_fallback(tmp_path: Path, model: str) -> None:
    vocab: object = {piece: index for index, piece in enumerate(SENTENCEPIECE)}
    if model == "Unigram":
        vocab = [[piece, -1.0] for piece in SENTENCEPIECE]
    decoders = [{"type": "Replace"}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    added = [{"id": 0, "content": "<unk>", "special": True}]
    folder = tokenizer(
        tmp_path / "model",
        {
            "model": {"type": model, "vocab": vocab},
            "decoder": {"type": "Sequence", "decoders": decoders},
            "added_tokens": added,
        },
    )
    late = {"1": {"content": "</s>", "special": True}, "262": {"content": "<go>", "special": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": late}))
    vocabulary = load_vocabulary(folder, 270)
    assert vocabulary.special == {"<unk>": 0, "</s>": 1}
    assert vocabulary.tokens[:3] == (b"", b"", b"\x00")
    assert vocabulary.tokens[258:264] == (b" yes", b"y", b" ", "é".encode(), b"<go>", b"")
    backends = Backends(folder, 270, (1,))
    name, source = backends.compile(Grammar(GrammarKind.CHOICE, '[" yes", "é"]'))
    matcher = ReadyGrammar(backends.get(name).load(source), (1,)).matcher()
    assert matcher.accept(258)
    assert matcher.accept(1)
    assert matcher.ended


def test_a_tokenizer_that_is_missing_or_strange(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"needs tokenizer\.json"):
        load_vocabulary(tmp_path, 10)
    for number, content in enumerate(
        [{}, {"model": {"vocab": {}}, "decoder": {"type": "CTC"}}, []]
    ):
        folder = tokenizer(tmp_path / str(number), content)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="tokenizer"):
            load_vocabulary(folder, 10)


def test_a_hopeless_walk_is_noticed(walker: Walker) -> None:
    """The walker itself: a text that breaks off is no whole one."""
    _, compiled = walker.compile(Grammar(GrammarKind.REGEX, "a{500,600}"))
    assert walker.walk(compiled, Random(1), limit=20) is None


def test_draws_follow_a_real_grammar_to_its_end(walker: Walker) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}}
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema | {"required": ["a", "b"]}))
    _, compiled = walker.compile(grammar)
    params = SamplingParams(max_tokens=200, seed=3, grammar=grammar, min_tokens=999, n=3)
    states, guide = SamplingStates(), Guide(compiled)
    outputs: list[tuple[int, ...]] = [(), (), ()]
    open_choices = [0, 1, 2]
    generator = torch.Generator().manual_seed(5)
    while open_choices:
        logits = torch.randn((1, VOCAB_SIZE), generator=generator)
        slots = [
            SampleSlot(choice, len(outputs[choice]), params, 1, (9,), outputs[choice], guide)
            for choice in open_choices
        ]
        for slot, drawn in zip(slots, sample(logits, [0] * len(slots), slots, states), strict=True):
            assert drawn.error == ""
            outputs[slot.choice] += (drawn.token_id,)
            if drawn.ended:
                assert drawn.token_id in (END, 0)
                open_choices.remove(slot.choice)
    for output in outputs:
        text = b"".join(walker.vocabulary.tokens[token] for token in output)
        assert set(json.loads(text)) == {"a", "b"}
    assert len(set(outputs)) == 3
