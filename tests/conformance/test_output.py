"""Fields of what an answer shows, and every field of the answer."""

import re
import time
from itertools import pairwise

import pytest

from tests.support.conformance import Api, Json, joined, text_of

field = pytest.mark.field
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}


# The answer's own fields


@field(
    "response.id",
    "response.object",
    "response.created",
    "response.model",
    "response.service_tier",
    "response.system_fingerprint",
    "response.choices",
    "response.choices.index",
    "response.choices.message",
    "response.choices.message.role",
    "response.choices.message.refusal",
    "response.choices.message.annotations",
    "response.choices.message.audio",
    "response.choices.message.function_call",
)
def test_every_field_of_an_answer(api: Api, only_baton: None) -> None:
    before = int(time.time())
    answer = api.chat()
    assert set(answer) == {
        *("id", "object", "created", "model", "choices", "usage", "service_tier"),
        *("system_fingerprint", "prompt_logprobs", "prompt_token_ids", "kv_transfer_params"),
    }
    assert answer["object"] == "chat.completion"
    assert before <= answer["created"] <= time.time()
    assert answer["model"] == api.model
    assert answer["service_tier"] is None
    assert answer["system_fingerprint"] == api.chat("Other.")["system_fingerprint"] != ""
    (choice,) = answer["choices"]
    assert set(choice) == {
        *("index", "message", "logprobs", "finish_reason", "stop_reason", "token_ids")
    }
    message = choice["message"]
    assert message["role"] == "assistant"
    assert text_of(answer) != ""
    for key in ("refusal", "annotations", "audio", "function_call", "reasoning"):
        assert message[key] is None
    assert message["reasoning_content"] is None
    assert not message.get("tool_calls")
    ids = {api.chat()["id"] for _ in range(2)}
    assert len(ids) == 2


@field(
    "response.usage",
    "response.usage.prompt_tokens",
    "response.usage.completion_tokens",
    "response.usage.total_tokens",
    "response.prompt_token_ids",
    "response.choices.token_ids",
    "return_token_ids",
)
def test_usage_counts_what_the_ids_show(api: Api) -> None:
    answer = api.chat(n=2, seed=5, temperature=1, return_token_ids=True)
    prompt = answer["prompt_token_ids"]
    assert api.decode(prompt).startswith("<|im_start|>user\nTell me")
    outputs = [choice["token_ids"] for choice in answer["choices"]]
    assert [api.decode(ids) for ids in outputs] == [text_of(answer, 0), text_of(answer, 1)]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["completion_tokens"] == sum(map(len, outputs))
    assert usage["total_tokens"] == len(prompt) + sum(map(len, outputs))
    silent = api.chat(seed=5, temperature=1)
    assert silent.get("prompt_token_ids") is None
    assert silent["choices"][0].get("token_ids") is None


@field("response.usage.prompt_tokens_details.cached_tokens")
def test_cached_tokens(api: Api, only_baton: None) -> None:
    question = "What is cached is whole blocks of sixteen tokens. " * 4
    cold = api.chat(question)["usage"]
    warm = api.chat(question)["usage"]
    assert cold["prompt_tokens_details"]["cached_tokens"] == 0
    assert warm["prompt_tokens_details"]["cached_tokens"] == (cold["prompt_tokens"] - 1) // 16 * 16


# Log-probabilities


@field(
    "logprobs",
    "top_logprobs",
    "response.choices.logprobs",
    "response.choices.logprobs.content",
    "response.choices.logprobs.content.token",
    "response.choices.logprobs.content.logprob",
    "response.choices.logprobs.content.bytes",
    "response.choices.logprobs.content.top_logprobs",
)
def test_logprobs(api: Api) -> None:
    assert api.chat()["choices"][0]["logprobs"] is None
    answer = api.chat(logprobs=True, top_logprobs=4)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"]
    assert "".join(entry["token"] for entry in entries) == text_of(answer)
    for entry in entries:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        top = entry["top_logprobs"]
        assert len(top) == 4
        assert all(one["logprob"] >= other["logprob"] for one, other in pairwise(top))
        assert all(bytes(one["bytes"]).decode() == one["token"] for one in top)
        assert top[0]["logprob"] == entry["logprob"] <= 0  # greedy draws the best
        assert top[0]["token"] == entry["token"]
    bare = api.chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in bare] == [[]] * len(entries)


@field("return_tokens_as_token_ids")
def test_return_tokens_as_token_ids(api: Api) -> None:
    answer = api.chat(
        logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True, return_token_ids=True
    )
    (choice,) = answer["choices"]
    names = [f"token_id:{token}" for token in choice["token_ids"]]
    entries = choice["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == names
    assert [entry["top_logprobs"][0]["token"] for entry in entries] == names
    assert "token_id" not in text_of(answer)


@field("logprobs")
def test_a_character_of_several_tokens(api: Api) -> None:
    """The token that completes it carries the whole; texts and bytes join to the content."""
    smile = api.encode("🙂")
    assert len(smile) > 1
    answer = api.chat(
        structured_outputs={"choice": ["🙂ü"]}, logprobs=True, top_logprobs=0, max_tokens=20
    )
    assert text_of(answer) == "🙂ü"
    entries = answer["choices"][0]["logprobs"]["content"]
    joined_bytes = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert re.sub(r"<\|\w+\|>$", "", joined_bytes.decode()) == "🙂ü"  # then an end token


def _scored(api: Api, prompt: list[int]) -> Json:
    body = {"model": api.model, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}
    answer: Json = api.post("/v1/completions", {**body, "temperature": 0})["choices"][0]
    return answer


@field("prompt_logprobs", "response.prompt_logprobs")
def test_prompt_logprobs(api: Api) -> None:
    answer = api.chat(prompt_logprobs=2, return_token_ids=True)
    ids, scores = answer["prompt_token_ids"], answer["prompt_logprobs"]
    assert len(scores) == len(ids)
    assert scores[0] is None
    for token, entry in zip(ids[1:], scores[1:], strict=True):
        own = entry[str(token)]
        ranks = sorted(value["rank"] for value in entry.values())
        assert ranks[:2] == [1, 2]
        assert len(entry) == (2 if own["rank"] <= 2 else 3)
        assert own["logprob"] <= 0
        by_rank = sorted(entry.values(), key=lambda value: value["rank"])
        assert all(a["logprob"] >= b["logprob"] for a, b in pairwise(by_rank))
    assert api.chat()["prompt_logprobs"] is None


@field("prompt_logprobs")
def test_scores_agree_with_what_was_reported_while_generating(api: Api) -> None:
    """P scores as a prompt what P and D have generated."""
    answer = api.chat(logprobs=True, return_token_ids=True, max_tokens=20)
    (choice,) = answer["choices"]
    whole = answer["prompt_token_ids"] + choice["token_ids"]
    scores = _scored(api, whole)["prompt_logprobs"][-20:]
    for token, entry, score in zip(
        choice["token_ids"], choice["logprobs"]["content"], scores, strict=True
    ):
        assert score[str(token)]["logprob"] == pytest.approx(entry["logprob"], abs=1e-3)
        assert score[str(token)]["rank"] == 1


@field("prompt_logprobs")
def test_prompt_logprobs_have_no_holes_when_the_prompt_is_cached(api: Api) -> None:
    question = "Is this prompt scored whole although all of it is cached? " * 12
    first = api.chat(question, prompt_logprobs=0)["prompt_logprobs"]
    api.chat(question)
    again = api.chat(question, prompt_logprobs=0)["prompt_logprobs"]
    values = [[next(iter(entry.values()))["logprob"] for entry in s[1:]] for s in (first, again)]
    assert len(first) > 150
    assert values[0] == pytest.approx(values[1], abs=1e-4)


# Echo


@field("echo", "continue_final_message")
def test_echo(api: Api) -> None:
    messages = [
        {"role": "user", "content": "Tell me about the sea."},
        {"role": "assistant", "content": "The sea is"},
    ]
    plain = api.chat(messages=messages, **CONTINUED)
    echoed = api.chat(messages=messages, echo=True, **CONTINUED)
    assert text_of(echoed) == "The sea is" + text_of(plain)
    assert echoed["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    assert len(echoed["prompt_logprobs"]) == echoed["usage"]["prompt_tokens"]
    chunks = api.chunks(messages=messages, echo=True, **CONTINUED)
    assert joined(chunks)[0]["content"] == text_of(echoed)
    assert not text_of(api.chat(echo=True)).startswith("Tell me")


# Streams


@field("stream", "stream_options", "stream_options.include_usage")
def test_stream(api: Api) -> None:
    full = api.chat(max_tokens=200)  # tokens that come fast share chunks
    chunks = api.chunks(max_tokens=200)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    assert len(chunks) > 2
    assert joined(chunks)[0]["content"] == text_of(full)
    assert not any(chunk.get("usage") for chunk in chunks)
    with_usage = api.chunks(max_tokens=200, stream_options={"include_usage": True})
    assert [chunk["choices"] for chunk in with_usage].count([]) == 1
    assert with_usage[-1]["choices"] == []
    last = with_usage[-1]["usage"]
    assert last["total_tokens"] == full["usage"]["total_tokens"]
    assert not any(chunk.get("usage") for chunk in with_usage[:-1])


@field("stream")
def test_the_role_comes_with_the_first_token(api: Api, only_baton: None) -> None:
    first = api.chunks()[0]["choices"][0]
    assert first["delta"]["role"] == "assistant"
    assert first["delta"]["content"] != ""


@field("stream_options.continuous_usage_stats")
def test_continuous_usage(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = api.chunks(max_tokens=200, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 200
    assert len(set(counts)) > 4
    alone = api.chunks(stream_options={"continuous_usage_stats": True})
    assert not any(chunk.get("usage") for chunk in alone)


@field("return_token_ids")
def test_token_ids_in_a_stream(api: Api) -> None:
    full = api.chat(return_token_ids=True)
    chunks = api.chunks(return_token_ids=True)
    prompts = [chunk["prompt_token_ids"] for chunk in chunks if chunk.get("prompt_token_ids")]
    assert prompts == [full["prompt_token_ids"]]
    assert chunks[0].get("prompt_token_ids")
    assert joined(chunks)[0]["token_ids"] == full["choices"][0]["token_ids"]
