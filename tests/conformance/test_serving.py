"""Fields of scheduling, caching, transfer and extensions."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.conformance import Api, Refused, assert_same, text_of
from tests.support.live_server import LiveServer

field = pytest.mark.field
SCRIPT = "tests.support.processors.Script"
LONG = "A prompt of several blocks, so that there is something to be found in the cache. " * 4


@field("request_id", "response.id")
def test_request_id(api: Api) -> None:
    assert api.chat(request_id="my-own")["id"] == "chatcmpl-my-own"
    assert {chunk["id"] for chunk in api.chunks(request_id="my-own")} == {"chatcmpl-my-own"}
    body = api.body(request_id="my-own")
    sent = api.post("/v1/chat/completions", body, {"X-Request-Id": "from-the-header"})
    assert sent["id"] == "chatcmpl-from-the-header"


@field("request_id")
def test_equal_request_ids_at_the_same_time(api: Api) -> None:
    found: list[str] = []
    ask = lambda: found.append(text_of(api.chat(request_id="same", max_tokens=30)))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


@field("cache_salt", "response.usage.prompt_tokens_details.cached_tokens")
def test_cache_salt(api: Api, only_baton: None) -> None:
    def cached(**fields: Any) -> int:
        usage = api.chat("Salted. " + LONG, **fields)["usage"]
        count: int = usage["prompt_tokens_details"]["cached_tokens"]
        return count

    assert cached(cache_salt="one") == 0
    hit = cached(cache_salt="one")
    assert hit > 0
    assert cached(cache_salt="two") == 0
    assert cached() == 0
    assert cached() == cached(cache_salt="two") == hit


@field("cache_salt")
def test_a_salt_changes_no_text(api: Api) -> None:
    assert text_of(api.chat(LONG, cache_salt="x" * 43)) == text_of(api.chat(LONG))


@field("priority")
def test_priority(own_server: Callable[..., tuple[Api, LiveServer]], mode: str) -> None:
    """One runs, two wait; the one that came last has the lower number and is the next to end."""
    api, server = own_server(worker={"max_running": 1})
    ended: list[str] = []

    def ask(name: str, **fields: Any) -> threading.Thread:
        def run() -> None:
            api.chat(f"I am {name}.", ignore_eos=True, **fields)
            ended.append(name)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def seen(name: str) -> int:
        return int(str(server.ledgers()[-1][name]))

    threads = []
    order: list[tuple[str, int]] = [("running", 0), ("late", 5), ("middle", 0), ("early", -5)]
    for position, (name, priority) in enumerate(order):
        tokens = 600 if name == "running" else 20
        threads.append(ask(name, priority=priority, max_tokens=tokens))
        while seen("requests") <= position or seen("steps") < 5:
            assert "running" not in ended, "it must outlast the others' arrival"
    for thread in threads:
        thread.join()
    assert ended == ["running", "early", "middle", "late"]


@field("logits_processors")
def test_logits_processors(api: Api, only_baton: None) -> None:
    ids = [310, 320, 330, 2]
    made = {"qualname": SCRIPT, "args": [ids]}
    assert api.ids(logits_processors=[made]) == ids
    named = {"qualname": SCRIPT, "kwargs": {"token_ids": ids}}
    assert api.ids(logits_processors=[named]) == ids
    biased = {"logit_bias": {"300": 50}}
    assert api.ids(**biased) == [300] * 8
    free = api.ids(**biased, logits_processors=["tests.support.processors.never_300"])
    assert 300 not in free


@field("logits_processors")
@pytest.mark.parametrize(
    "name", ["os.system", "tests.support.processors.no_such", "x", SCRIPT + "x"]
)
def test_other_logits_processors_are_refused(api: Api, only_baton: None, name: str) -> None:
    refusal = api.refused(logits_processors=[name])
    assert (refusal.status, refusal.error["param"]) == (400, "logits_processors")


@field("logits_processors")
def test_without_a_pattern_every_processor_is_refused(own_server: Callable[..., Any]) -> None:
    off = {"logits_processor_pattern": ""}
    api, _ = own_server(router=off, worker=off)
    refusal = api.refused(logits_processors=[{"qualname": SCRIPT, "args": [[300]]}])
    assert (refusal.status, refusal.error["param"]) == (400, "logits_processors")


@field("vllm_xargs")
def test_vllm_xargs(api: Api, only_baton: None) -> None:
    """They reach the processors that want them, and change nothing else."""
    extra = {"count": 3, "factor": 0.5, "name": "x", "list": ["a", 1, 2.5]}
    assert text_of(api.chat(vllm_xargs=extra)) == text_of(api.chat())
    wants = {"qualname": "tests.support.processors.FromExtraArgs"}
    assert api.ids(logits_processors=[wants], vllm_xargs={"token": 321}, max_tokens=2) == [321] * 2


# The two-step protocol


@field("kv_transfer_params", "response.kv_transfer_params")
@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 1.0, "seed": 9}, {"logprobs": True}], ids=str
)
def test_two_steps_of_a_proxy(api: Api, mode: str, fields: dict[str, Any]) -> None:
    """What existing proxies do: prefill with one token, then hand the parameters to decode."""
    if mode != "split":
        pytest.skip("needs a P")
    want = api.chat(LONG, **fields)
    first = api.chat(
        LONG,
        kv_transfer_params={"do_remote_decode": True},
        **{**fields, "max_tokens": 1, "max_completion_tokens": 1},
    )
    params = first["kv_transfer_params"]
    assert params["do_remote_prefill"] is True
    second = api.chat(LONG, kv_transfer_params=params, **fields)
    assert_same(second["choices"], want["choices"])
    assert second["usage"]["completion_tokens"] == want["usage"]["completion_tokens"]
    api.answers.clear()


@field("kv_transfer_params")
def test_unknown_or_forged_transfer_parameters(api: Api, only_baton: None) -> None:
    assert text_of(api.chat(kv_transfer_params={"something": 1})) == text_of(api.chat())
    assert text_of(api.chat(kv_transfer_params={})) == text_of(api.chat())
    forged = {"do_remote_prefill": True, "remote_engine_id": "x", "remote_block_ids": [1, 2]}
    try:
        text = text_of(api.chat(kv_transfer_params={**forged, "remote_host": "10.0.0.1"}))
    except Refused as refusal:
        text, status = None, refusal.status
    assert text == text_of(api.chat()) if text is not None else status == 400


# A model that often ends: its generation config names many end tokens


ENDS = [2, 0, *range(1000, 1400)]


@pytest.fixture
def ending(own_server: Callable[..., Any], variant: Callable[..., Path]) -> Api:
    api: Api = own_server(model=variant("generation_config.json", eos_token_id=ENDS))[0]
    return api


@field("length_penalty")
def test_length_penalty(ending: Api) -> None:
    """It weighs a beam that ended early against longer ones."""

    def beams(penalty: float) -> list[list[int]]:
        answer = ending.chat(
            use_beam_search=True,
            n=6,
            max_tokens=12,
            length_penalty=penalty,
            return_token_ids=True,
        )
        return [choice["token_ids"] for choice in answer["choices"]]

    neutral, long, short = beams(1.0), beams(8.0), beams(-8.0)
    assert len({len(ids) for ids in neutral}) > 1, "beams of several lengths"
    assert long != short
    assert len(long[0]) >= len(neutral[0]) >= len(short[0])
    assert len(long[0]) > len(short[0])


@field("min_tokens", "ignore_eos")
def test_all_the_models_end_tokens_count(ending: Api) -> None:
    ends = set(ENDS)
    answer = ending.chat(max_tokens=60, return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == choice["token_ids"][-1]
    assert choice["token_ids"][-1] in ends
    assert len(choice["token_ids"]) < 30
    later = ending.ids(max_tokens=60, min_tokens=30)
    assert not ends & set(later[:30])
    assert len(ending.ids(max_tokens=60, ignore_eos=True)) == 60
