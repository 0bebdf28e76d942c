from collections.abc import Sequence

import pytest

from contracts.events import FinishReason, TokenLogprob, TokensOut
from contracts.ids import RequestId
from contracts.sampling import SamplingParams
from router.choice import Choice, EndRules, LogprobEntry, Piece, TokenFault
from router.detokenizer import Vocabulary
from tests.support.fake_worker import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
EOS, OTHER_EOS = (VOCABULARY.tokenizer.token_to_id(t) or 0 for t in ("<|im_end|>", "<|endoftext|>"))


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def choice(
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    logprobs: int | None = None,
    *,
    ignore_eos: bool = False,
) -> Choice:
    params = SamplingParams(
        max_tokens=100,
        eos_token_ids=() if ignore_eos else (EOS, OTHER_EOS),
        stop_token_ids=tuple(stop_token_ids),
        logprobs=logprobs,
    )
    return Choice(0, tuple(ids("prompt")), params, EndRules(tuple(stop), EOS), VOCABULARY)


def out(
    position: int,
    token_ids: Sequence[int],
    finish: FinishReason | None = None,
    logprobs: Sequence[TokenLogprob] = (),
) -> TokensOut:
    tokens = tuple(token_ids)
    return TokensOut(RequestId("r"), 0, 0, position, tokens, tuple(logprobs), finish)


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
