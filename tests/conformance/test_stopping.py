"""Fields of when an answer ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.conformance import Api, joined, text_of

EOS, BOS = 2, 0
field = pytest.mark.field
END: dict[str, Any] = {"logit_bias": {str(EOS): 100}}  # the model wants to end at once


@field("max_tokens", "response.choices.finish_reason")
@pytest.mark.parametrize("limit", [1, 2, 17])
def test_max_tokens(api: Api, limit: int) -> None:
    answer = api.chat(max_tokens=limit, return_token_ids=True)
    (choice,) = answer["choices"]
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"] == limit
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)


@field("max_completion_tokens")
def test_max_completion_tokens_wins(api: Api) -> None:
    assert api.chat(max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    answer = api.chat(max_completion_tokens=3, max_tokens=9)
    assert answer["usage"]["completion_tokens"] == 3


@field("max_tokens")
def test_a_limit_is_cut_to_what_the_context_leaves(api: Api) -> None:
    """In the context of 4096 tokens a prompt of about 4080 leaves about 16."""
    words = "sea " * 4090
    answer = api.chat(words, max_tokens=4000, truncate_prompt_tokens=4080)
    assert answer["usage"]["prompt_tokens"] == 4080
    assert answer["usage"]["total_tokens"] == 4096
    assert answer["choices"][0]["finish_reason"] == "length"


@field("ignore_eos")
def test_ignore_eos(api: Api) -> None:
    ended = api.chat(return_token_ids=True, **END)
    assert ended["choices"][0]["token_ids"] == [EOS]
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["choices"][0]["stop_reason"] is None
    assert text_of(ended) == ""
    assert ended["usage"]["completion_tokens"] == 1
    assert api.ids(ignore_eos=True, **END) == [EOS] * 8


@field("ignore_eos", "response.choices.stop_reason")
def test_the_models_other_end_token_is_named(api: Api) -> None:
    (choice,) = api.chat(return_token_ids=True, logit_bias={str(BOS): 100})["choices"]
    assert choice["token_ids"] == [BOS]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", BOS)


@field("min_tokens")
def test_min_tokens_masks_all_end_tokens(api: Api) -> None:
    """From the very first token, which P draws."""
    for minimum in (1, 4):
        ids = api.ids(min_tokens=minimum, **END)
        assert len(ids) == minimum + 1
        assert not {EOS, BOS} & set(ids[:-1])
        assert ids[-1] == EOS
    first = api.ids()[0]
    ids = api.ids(min_tokens=3, stop_token_ids=[first])
    assert first not in ids[:3]


@field("min_tokens")
def test_min_tokens_with_a_stop_string(api: Api) -> None:
    text = text_of(api.chat())
    stop = text[:3]
    assert text_of(api.chat(stop=stop)) == ""
    answer = api.chat(stop=stop, min_tokens=3)
    assert answer["usage"]["completion_tokens"] >= 3


@field("stop", "response.choices.message.content", "response.choices.stop_reason")
def test_stop(api: Api) -> None:
    free = api.chat(max_tokens=12, return_token_ids=True)
    text, ids = text_of(free), free["choices"][0]["token_ids"]
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    cut = text[: text.index(stop)]
    answer = api.chat(
        max_tokens=12, stop=["never there", stop], return_token_ids=True, logprobs=True
    )
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == cut
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    count = len(choice["token_ids"])
    assert choice["token_ids"] == ids[:count]
    assert stop in api.decode(ids[:count])
    assert stop not in api.decode(ids[: count - 1])
    assert len(choice["logprobs"]["content"]) == count == answer["usage"]["completion_tokens"]
    alone = api.chat(max_tokens=12, stop=stop)
    assert text_of(alone) == cut


@field("include_stop_str_in_output")
def test_include_stop_str_in_output(api: Api) -> None:
    text = text_of(api.chat(max_tokens=12))
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    kept = api.chat(max_tokens=12, stop=stop, include_stop_str_in_output=True)
    assert text_of(kept) == text[: text.index(stop)] + stop
    assert kept["choices"][0]["stop_reason"] == stop


@field("stop_token_ids", "include_stop_str_in_output", "response.choices.stop_reason")
@pytest.mark.parametrize("position", [0, 3])
def test_stop_token_ids(api: Api, position: int) -> None:
    ids = api.ids()
    stop = ids[position]
    count = ids.index(stop) + 1
    answer = api.chat(stop_token_ids=[stop], return_token_ids=True, logprobs=True)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == ids[:count]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["message"]["content"] == api.decode(ids[: count - 1])
    assert len(choice["logprobs"]["content"]) == count == answer["usage"]["completion_tokens"]
    kept = api.chat(stop_token_ids=[stop], include_stop_str_in_output=True)
    assert text_of(kept) == api.decode(ids[:count])
    assert api.chat(stop_token_ids=[stop], ignore_eos=True)["usage"] == answer["usage"]


@field("stop")
def test_text_that_might_become_a_stop_string_is_not_lost(api: Api) -> None:
    text = text_of(api.chat(max_tokens=6))
    assert text_of(api.chat(max_tokens=6, stop=text[-2:] + "\x00never")) == text
    chunks = api.chunks(max_tokens=6, stop=text[-2:] + "\x00never")
    assert joined(chunks)[0]["content"] == text


TWO: dict[str, Any] = {"logit_bias": {"1": 100}, "max_tokens": 2}


@field("skip_special_tokens")
def test_skip_special_tokens(api: Api) -> None:
    assert text_of(api.chat(**TWO)) == ""
    assert text_of(api.chat(skip_special_tokens=False, **TWO)) == "<|im_start|><|im_start|>"


@field("spaces_between_special_tokens")
def test_spaces_between_special_tokens(
    own_server: Callable[..., Any], variant: Callable[..., Path]
) -> None:
    """Only some tokenizers write such spaces, the demo model's not; this one does."""
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    api, _ = own_server(model=variant("tokenizer.json", decoder=decoder))
    shown = {"skip_special_tokens": False, **TWO}
    assert text_of(api.chat(**shown)).strip() == "<|im_start|> <|im_start|>"
    tight = api.chat(spaces_between_special_tokens=False, **shown)
    assert text_of(tight).strip() == "<|im_start|><|im_start|>"
