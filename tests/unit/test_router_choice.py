from collections.abc import Sequence
from typing import Any

import pytest

from contracts.events import FinishReason, TokenLogprob
from contracts.sampling import Grammar, GrammarKind, SamplingParams
from router.choice import Choice, TokenFault
from router.logprobs import LogprobEntry, logprobs_json
from router.pieces import Piece
from router.rules import OutputRules
from tests.support.chat_answer import EOS, OTHER_EOS, VOCABULARY, ids, out
from tests.support.tiny_parser import TinyParser


def choice(
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    logprobs: int | None = None,
    *,
    ignore_eos: bool = False,
    rules: OutputRules | None = None,
    **more: Any,
) -> Choice:
    params = SamplingParams(
        max_tokens=100,
        eos_token_ids=() if ignore_eos else (EOS, OTHER_EOS),
        stop_token_ids=tuple(stop_token_ids),
        logprobs=logprobs,
        **more,
    )
    rules = rules or OutputRules(tuple(stop), EOS)
    return Choice(0, tuple(ids("prompt")), params, rules, VOCABULARY)


def piece(got: Piece | None) -> Piece:
    assert got is not None
    return got


def test_tokens_become_text() -> None:
    one = choice()
    tokens = ids("the cat")
    first = piece(one.add(out(0, tokens[:1]), 5))
    rest = piece(one.add(out(1, tokens[1:], FinishReason.LENGTH), 6))
    assert first.text + rest.text == "the cat"
    assert (first.first, rest.first) == (True, False)
    assert first.completion_tokens == 6
    assert (rest.finish_reason, rest.stop_reason) == ("length", None)
    assert one.finished


def test_equal_repeats_are_dropped_and_overlaps_continue() -> None:
    one = choice()
    tokens = ids("the cat sat")
    one.add(out(0, tokens[:2]))
    assert one.add(out(0, tokens[:1])) is None
    assert one.add(out(1, tokens[1:2])) is None
    assert piece(one.add(out(0, tokens))).token_ids == tuple(tokens[2:])
    assert one.token_ids == tokens


def test_an_unequal_repeat_is_a_fault() -> None:
    one = choice()
    one.add(out(0, [1, 2]))
    with pytest.raises(TokenFault, match="position 1"):
        one.add(out(1, [3]))


def test_a_gap_is_a_fault() -> None:
    one = choice()
    one.add(out(0, [1]))
    with pytest.raises(TokenFault, match="position 2"):
        one.add(out(2, [3]))


def test_a_repeat_after_the_end_is_still_compared() -> None:
    one = choice()
    one.add(out(0, [1], FinishReason.LENGTH))
    assert one.add(out(0, [1], FinishReason.LENGTH)) is None
    with pytest.raises(TokenFault):
        one.add(out(0, [2]))


@pytest.mark.parametrize(
    ("token", "stop_token_ids", "reason"),
    [
        (EOS, [], None),
        (OTHER_EOS, [], OTHER_EOS),
        (EOS, [EOS], None),
        (ids("t")[0], ids("t")[:1], ids("t")[0]),
    ],
    ids=["primary", "secondary", "eos-before-stop-ids", "stop-id"],
)
def test_end_tokens_are_counted_but_not_shown(
    token: int, stop_token_ids: list[int], reason: int | None
) -> None:
    one = choice(stop_token_ids=stop_token_ids)
    got = piece(one.add(out(0, [*ids("sa"), token], FinishReason.STOP)))
    assert got.text == "sa"
    assert got.token_ids[-1] == token
    assert (got.finish_reason, got.stop_reason) == ("stop", reason)


def test_eos_as_stop_id_with_ignore_eos() -> None:
    one = choice(stop_token_ids=[EOS], ignore_eos=True)
    assert piece(one.add(out(0, [EOS], FinishReason.STOP))).stop_reason == EOS


def test_a_stop_string_across_tokens_drops_what_follows_it() -> None:
    tokens = [*ids("a"), *ids("E"), *ids("N"), *ids("D"), *ids("x")]
    one = choice(stop=["ND"])
    texts = [piece(one.add(out(i, [t]))).text for i, t in enumerate(tokens[:2])]
    got = piece(one.add(out(2, tokens[2:], FinishReason.LENGTH)))
    assert "".join(texts) + got.text == "aE"
    assert (got.finish_reason, got.stop_reason) == ("stop", "ND")
    assert one.token_ids == tokens[:4]
    assert one.finished
    assert one.add(out(5, [7])) is None


def test_held_text_comes_with_the_end() -> None:
    one = choice(stop=["ENDING"])
    assert piece(one.add(out(0, ids("a E")))).text == "a "
    got = piece(one.add(out(len(ids("a E")), [*ids("ND"), EOS], FinishReason.STOP)))
    assert (got.text, got.finish_reason, got.stop_reason) == ("END", "stop", None)


def test_half_a_character_at_the_end() -> None:
    euro = ids("€")
    one = choice()
    assert piece(one.add(out(0, euro[:1]))).text == ""
    assert piece(one.add(out(1, euro[1:2], FinishReason.LENGTH))).text == "\ufffd"
    one = choice()
    assert piece(one.add(out(0, [euro[0], EOS], FinishReason.STOP))).text == "\ufffd"


def test_an_end_without_a_token() -> None:
    one = choice(stop=["abc"])
    one.add(out(0, ids("a")))
    got = piece(one.add(out(1, [], FinishReason.LENGTH)))
    assert (got.text, got.token_ids, got.finish_reason) == ("a", (), "length")


def test_logprobs_have_an_entry_a_token() -> None:
    euro, tokens = ids("€"), ids("a")
    one = choice(logprobs=2, stop=["never"])
    values = [TokenLogprob(-0.5, ((t, -0.5), (EOS, -1.0), (3, -2.0))) for t in [*tokens, *euro]]
    values.append(TokenLogprob(-float("inf"), ((EOS, -0.1), (euro[0], -9e9))))
    got = piece(one.add(out(0, [*tokens, *euro, EOS], FinishReason.STOP, values)))
    assert [entry.token for entry in got.logprobs] == ["a", "", "", "€", "<|im_end|>"]
    assert got.logprobs[0] == LogprobEntry("a", -0.5, (("a", -0.5), ("<|im_end|>", -1.0)))
    assert got.logprobs[-1].logprob == -9999.0
    assert got.logprobs[-1].top == (("<|im_end|>", -0.1), ("", -9999.0))
    assert len(got.token_ids) == len(got.logprobs)


def test_a_hidden_stop_token_shows_in_its_entry_only() -> None:
    token = ids("t")[0]
    one = choice(stop_token_ids=[token], logprobs=0)
    got = piece(one.add(out(0, [token], FinishReason.STOP, [TokenLogprob(-1.0)])))
    assert got.text == ""
    assert got.logprobs == (LogprobEntry("t", -1.0),)


def test_no_logprobs_after_a_stop_string() -> None:
    one = choice(stop=["a"], logprobs=0)
    tokens = [*ids("a"), *ids("b")]
    got = piece(one.add(out(0, tokens, None, [TokenLogprob(-1.0)] * 2)))
    assert len(got.logprobs) == len(got.token_ids) == 1


# Kept ends


def test_the_stop_string_is_kept_up_to_its_end() -> None:
    one = choice(rules=OutputRules(("ND",), EOS, include_stop=True))
    got = piece(one.add(out(0, [*ids("a"), *ids("E"), *ids("N"), *ids("D"), *ids("x")])))
    assert (got.text, got.finish_reason, got.stop_reason) == ("aEND", "stop", "ND")


def test_the_stop_tokens_text_is_kept() -> None:
    token = ids("t")[0]
    one = choice(stop_token_ids=[token], rules=OutputRules((), EOS, include_stop=True))
    got = piece(one.add(out(0, [*ids("sa"), token], FinishReason.STOP)))
    assert (got.text, got.stop_reason) == ("sat", token)


@pytest.mark.parametrize(
    ("include", "skip", "text"),
    [(True, True, "a"), (True, False, "a<|im_end|>"), (False, False, "a")],
)
def test_eos_shows_only_if_both_special_tokens_and_ends_are_kept(
    include: bool, skip: bool, text: str
) -> None:
    one = choice(rules=OutputRules((), EOS, include_stop=include, skip_special_tokens=skip))
    got = piece(one.add(out(0, [*ids("a"), EOS], FinishReason.STOP)))
    assert (got.text, got.finish_reason, got.stop_reason) == (text, "stop", None)


def test_special_tokens_within_the_text_are_skipped_or_shown() -> None:
    tokens = [*ids("a"), OTHER_EOS, *ids("b")]
    for skip, text in [(True, "ab"), (False, "a<|endoftext|>b")]:
        one = choice(ignore_eos=True, rules=OutputRules((), EOS, skip_special_tokens=skip))
        assert piece(one.add(out(0, tokens, FinishReason.LENGTH))).text == text


# Where ends are looked for


def test_stop_strings_are_not_looked_for_in_the_first_tokens() -> None:
    a, b = ids("a"), ids("b")
    one = choice(stop=["ab", "a"], min_tokens=2)
    got = piece(one.add(out(0, [*a, *b])))
    assert (got.text, got.finish_reason) == ("ab", None)
    got = piece(one.add(out(2, a)))
    assert (got.text, got.stop_reason) == ("", "a")


def test_a_stop_string_may_begin_in_the_first_tokens() -> None:
    one = choice(stop=["ab"], min_tokens=1)
    got = piece(one.add(out(0, [*ids("a"), *ids("b")])))
    assert (got.text, got.stop_reason) == ("", "ab")


@pytest.mark.parametrize(("token", "reason"), [(EOS, None), (OTHER_EOS, OTHER_EOS)])
def test_a_complete_grammar_ends_like_eos_even_if_that_is_ignored(
    token: int, reason: int | None
) -> None:
    grammar = Grammar(GrammarKind.JSON_OBJECT, end_token_ids=(EOS, OTHER_EOS))
    one = choice(
        ignore_eos=True,
        grammar=grammar,
        rules=OutputRules((), EOS, skip_special_tokens=False),
    )
    got = piece(one.add(out(0, [*ids("{}"), token], FinishReason.STOP)))
    assert (got.text, got.finish_reason, got.stop_reason) == ("{}", "stop", reason)
    assert got.token_ids[-1] == token


# Log-probabilities


def test_tokens_by_id() -> None:
    one = choice(logprobs=2, rules=OutputRules((), EOS, tokens_as_ids=True))
    token = ids("a")[0]
    values = [TokenLogprob(-1.0, ((token, -1.0), (EOS, -2.0), (3, -3.0))), TokenLogprob(-0.5)]
    got = piece(one.add(out(0, [token, EOS], FinishReason.STOP, values)))
    assert got.text == "a"
    assert got.logprobs == (
        LogprobEntry(
            f"token_id:{token}",
            -1.0,
            ((f"token_id:{token}", -1.0), (f"token_id:{EOS}", -2.0)),
            ("a", "a", "<|im_end|>"),
        ),
        LogprobEntry(f"token_id:{EOS}", -0.5, (), ("<|im_end|>",)),
    )
    first = logprobs_json(got.logprobs)["content"][0]
    assert (first["token"], first["bytes"]) == (f"token_id:{token}", list(b"a"))  # the real bytes
    assert first["top_logprobs"][1]["bytes"] == list(b"<|im_end|>")


@pytest.mark.parametrize(("wanted", "shown"), [(0, 0), (1, 1), (3, 3), (-1, 4)])
def test_exactly_as_many_alternatives_as_wanted(wanted: int, shown: int) -> None:
    one = choice(logprobs=wanted)
    value = TokenLogprob(-1.0, tuple((token, -1.0 - token) for token in range(4)))
    got = piece(one.add(out(0, ids("a"), None, [value])))
    assert len(got.logprobs[0].top) == shown


# Parsing


def parsed(text: str, finish: FinishReason = FinishReason.STOP, **rules: Any) -> Piece:
    one = choice(rules=OutputRules((), EOS, make_parser=TinyParser, **rules))
    closing = [EOS] if finish is FinishReason.STOP else []
    return piece(one.add(out(0, [*ids(text), *closing], finish)))


@pytest.mark.parametrize(
    ("text", "finish", "rules", "reason"),
    [
        ("<c>f|{}</c>", FinishReason.STOP, {}, "tool_calls"),
        ("<c>f|{}</c>", FinishReason.STOP, {"calls_finish": "stop"}, "stop"),
        ("<c>f|{", FinishReason.LENGTH, {}, "length"),
        ("<c>f", FinishReason.STOP, {}, "stop"),
        ("f", FinishReason.STOP, {}, "stop"),
    ],
    ids=["called", "named", "cut", "no-call-after-all", "none"],
)
def test_the_finish_reason_tells_of_calls(
    text: str, finish: FinishReason, rules: dict[str, Any], reason: str
) -> None:
    got = parsed(text, finish, **rules)
    assert (got.finish_reason, got.stop_reason) == (reason, None)


def test_a_call_that_ended_with_a_stop_string_keeps_its_stop_reason() -> None:
    one = choice(rules=OutputRules(("</c>",), EOS, make_parser=TinyParser))
    got = piece(one.add(out(0, ids("<c>f|{}</c>"))))
    assert (got.finish_reason, got.stop_reason) == ("tool_calls", "</c>")
    assert [type(delta).__name__ for delta in got.deltas] == ["ToolCallStart", "ToolArguments"]


def test_neighbouring_deltas_of_one_piece_are_joined() -> None:
    got = parsed("<t>so it is</t>yes it is")
    assert [type(delta).__name__ for delta in got.deltas] == ["Reasoning", "Content"]
    assert got.text == ""


def test_what_the_parser_holds_comes_with_the_end() -> None:
    assert parsed("a</", FinishReason.LENGTH).parts == parsed("a</").parts
