"""kv_transfer_params: a superset of vLLM's fields that nobody can edit."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidRequest
from contracts.ids import Incarnation, TransferId, new_incarnation
from kv_transfer.digest import prompt_digest, semantic_hash
from kv_transfer.params import (
    KvTransferParams,
    decode_and_verify,
    decode_incarnation,
    encode_incarnation,
    sign,
)

KEY = "cluster key"
SCOPE = "cluster/model"
ADDRESS = "10.11.12.13"
PARAMS = KvTransferParams(
    transfer_id=TransferId("ab" * 16),
    incarnation=encode_incarnation(Incarnation((1 << 63) - 1)),
    prompt_digest="cd" * 32,
    semantic_hash="ef" * 32,
    remote_engine_id="p0",
    remote_host=ADDRESS,
    remote_port=50051,
    remote_request_id="r1",
    remote_num_tokens=1000,
    remote_block_ids=(5, 6, 7),
    lease_ms=2000,
)
VLLM_FIELDS = {
    "do_remote_prefill",
    "do_remote_decode",
    "remote_engine_id",
    "remote_block_ids",
    "remote_host",
    "remote_port",
    "remote_request_id",
    "remote_num_tokens",
    "tp_size",
}


def signed() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(sign(PARAMS, KEY, SCOPE).encode())
    return data


def refused(text: str, key: str = KEY, scope: str = SCOPE) -> str:
    with pytest.raises(InvalidRequest) as error:
        decode_and_verify(text, key, scope)
    assert error.value.param == "kv_transfer_params"
    assert ADDRESS not in str(error.value)
    assert error.value.__cause__ is None
    return str(error.value)


def test_what_was_signed_is_read_back() -> None:
    params = sign(PARAMS, KEY, SCOPE)
    assert decode_and_verify(params.encode(), KEY, SCOPE) == params
    assert replace(params, key_id="", mac="") == PARAMS
    assert params.peer_address == f"{ADDRESS}:50051"
    assert replace(params, remote_host="::1").peer_address == "[::1]:50051"


def test_vllm_readers_find_their_fields_and_no_number_loses_bits() -> None:
    data = signed()
    assert data.keys() >= VLLM_FIELDS
    assert data["remote_block_ids"] == [5, 6, 7]
    assert all(value < 1 << 53 for value in data.values() if isinstance(value, int))


def test_another_writer_of_json_changes_nothing() -> None:
    """Order, spaces and escapes are the writer's own."""
    reordered = dict(sorted(signed().items(), reverse=True))
    assert decode_and_verify(json.dumps(reordered, indent=2), KEY, SCOPE).mac == reordered["mac"]


@pytest.mark.parametrize("name", [item.name for item in fields(PARAMS) if item.name != "extra"])
def test_no_field_can_be_edited_or_left_out(name: str) -> None:
    data = signed()
    value = data.pop(name)
    refused(json.dumps(data))
    edits: list[object] = [None, [], [1], {}, "x", 3.5, 12345, not value if value in (0, 1) else 0]
    for edit in edits:
        refused(json.dumps({**data, name: edit}))


def test_unknown_fields_are_kept_and_covered_by_the_mac() -> None:
    data = json.loads(sign(replace(PARAMS, extra={"aux": {"slots": [1]}}), KEY, SCOPE).encode())
    params = decode_and_verify(json.dumps(data), KEY, SCOPE)
    assert params.extra == {"aux": {"slots": [1]}}
    assert json.loads(params.encode()) == data
    data["aux"]["slots"] = [2]
    assert "changed" in refused(json.dumps(data))
    assert "changed" in refused(json.dumps({**signed(), "added": 1}))


def test_another_key_or_scope_is_foreign() -> None:
    text = sign(PARAMS, KEY, SCOPE).encode()
    assert "another cluster" in refused(text, key="other")
    assert "another use" in refused(text, scope="cluster/other-model")
    data = json.loads(sign(PARAMS, "other", SCOPE).encode())
    data["key_id"] = signed()["key_id"]  # a forger who knows the name of the right key
    assert "changed" in refused(json.dumps(data))


def test_unsigned_params_say_so() -> None:
    assert "not signed" in refused(PARAMS.encode())
    assert "not signed" in refused("{}")
    assert "not signed" in refused(json.dumps({**signed(), "mac": 5}))


def test_what_is_signed_but_does_not_fit_is_refused() -> None:
    """A cluster of mixed versions."""
    for change in ({"remote_port": "50051"}, {"tp_size": True}, {"remote_block_ids": (1, "2")}):
        wrong = sign(replace(PARAMS, **change), KEY, SCOPE)
        assert next(iter(change)) in refused(wrong.encode())
    assert "here 1, theirs is 9" in refused(
        sign(replace(PARAMS, protocol_version=9), KEY, SCOPE).encode()
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        '"x"',
        "{",
        "{'a': 1}",
        '{"a": NaN}',
        '{"mac": "a", "mac": "b"}',
        '{"mac": "\\ud800"}',
        '{"a": ' * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
        " " * (2 << 20),
    ],
    ids=range(14),
)
def test_what_is_no_object_is_refused(text: str) -> None:
    refused(text)


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()))
def test_any_unknown_fields_survive(extra: dict[str, object]) -> None:
    names = {item.name for item in fields(PARAMS)}
    extra = {name: value for name, value in extra.items() if name not in names}
    params = sign(replace(PARAMS, extra=extra), KEY, SCOPE)
    assert decode_and_verify(params.encode(), KEY, SCOPE) == params


def test_incarnations_survive_json() -> None:
    incarnation = new_incarnation()
    assert decode_incarnation(encode_incarnation(incarnation)) == incarnation
    for text in ("", "x", "AAAA", "ü" * 12, "A" * 400):
        with pytest.raises(InvalidRequest):
            decode_incarnation(text)


def test_every_part_of_a_prompt_changes_its_digest() -> None:
    digests = [
        prompt_digest("h", "s", [1, 2]),
        prompt_digest("h2", "s", [1, 2]),
        prompt_digest("h", "s2", [1, 2]),
        prompt_digest("hs", "", [1, 2]),
        prompt_digest("h", "s", [1]),
        prompt_digest("h", "s", [2, 1]),
        prompt_digest("h", "s", [1, 2], adapter="a"),
        prompt_digest("h", "s", [1, 2], media=[("m", 0, 1)]),
        prompt_digest("h", "s", [1, 2], media=[("m", 0, 2)]),
        prompt_digest("h", "s", [1, 2], media=[("m", 0, 1), ("m", 0, 1)]),
        prompt_digest("h", "s", [0x0201]),
        prompt_digest("h", "s", []),
    ]
    assert len(set(digests)) == len(digests)
    assert prompt_digest("h", "s", (1, 2)) == digests[0]


def test_a_prompt_digest_is_the_same_in_every_process_and_version() -> None:
    assert prompt_digest("h", "s", [1, 2], "a", [("m", 0, 1)]) == (
        "d208ad552023d23c00b71db42ba14e95cae8b5eb2831a872d348c612eaa444b1"
    )


def test_a_token_id_has_32_bits() -> None:
    prompt_digest("h", "\ud800", [(1 << 32) - 1])
    for token in (-1, 1 << 32):
        with pytest.raises(ValueError, match="32-bit"):
            prompt_digest("h", "", [token])


def test_a_semantic_hash_is_of_names_and_values_in_any_order() -> None:
    assert semantic_hash({"a": "1", "b": "2"}) == semantic_hash({"b": "2", "a": "1"})
    others = [{"a": "2", "b": "1"}, {"a": "1"}, {"a1": "", "b": "2"}, {"a": "1b", "2": ""}]
    hashes = {semantic_hash(parts) for parts in ({"a": "1", "b": "2"}, *others)}
    assert len(hashes) == 5
