"""`kv_transfer_params`: what names a handoff outside the peer link, signed against edits (C3).

A superset of vLLM's NIXL fields. It passes through routers and, on the two-step path, clients:
it holds no agent metadata and no memory address. Freshness is the claim's business (C1), not
the mac's; `remote_block_ids` is advisory.

    mac = HMAC-SHA256(cluster key, domain, scope, canonical JSON of all fields but `mac`)

`scope` is whatever the issuer binds the params to beyond their fields (cluster id, model,
API-key scope); the reader must come to the same text by itself.
"""

import base64
import functools
import hashlib
import hmac
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from contracts.errors import InvalidRequest
from contracts.ids import Incarnation, TransferId
from kv_transfer.layout import PROTOCOL_VERSION

MAX_TEXT_BYTES = 1 << 20
HANDOFF_SCOPE = "handoff"  # `scope` of params that go from a P by a router to a D
_DOMAIN = b"baton kv_transfer_params 1"


@dataclass(frozen=True, slots=True)
class KvTransferParams:
    """One handoff offered by a P. `extra` holds fields this version does not know (signed too)."""

    transfer_id: TransferId
    incarnation: str  # of P, see `encode_incarnation`
    prompt_digest: str
    semantic_hash: str
    remote_engine_id: str  # P's worker id
    remote_host: str  # of P's peer link
    remote_port: int
    remote_request_id: str
    remote_num_tokens: int
    lease_ms: int
    remote_block_ids: tuple[int, ...] = ()
    do_remote_prefill: bool = True
    do_remote_decode: bool = False
    tp_size: int = 1
    protocol_version: int = PROTOCOL_VERSION
    key_id: str = ""
    mac: str = ""
    extra: Mapping[str, object] = field(default_factory=dict[str, object])

    @property
    def peer_address(self) -> str:
        """host:port of P's peer link."""
        host = f"[{self.remote_host}]" if ":" in self.remote_host else self.remote_host
        return f"{host}:{self.remote_port}"

    def encode(self) -> str:
        """A JSON object as text."""
        return json.dumps(_to_json(self), separators=(",", ":"))


def sign(params: KvTransferParams, cluster_key: str, scope: str) -> KvTransferParams:
    """The same params with `key_id` and `mac` set."""
    named = {**_to_json(params), "key_id": key_id(cluster_key)}
    return replace(params, key_id=named["key_id"], mac=_mac(named, cluster_key, scope))


def decode_and_verify(text: str, cluster_key: str, scope: str) -> KvTransferParams:
    """Read params and check that this cluster issued exactly these for `scope`.

    Raises:
        InvalidRequest: they are malformed, unsigned, edited or foreign. Messages name fields,
            never their values, so that no address gets out.
    """
    data = _parse(text)
    mac = data.get("mac")
    if not isinstance(mac, str) or not mac:
        _refuse("not signed by this cluster")
    if data.get("key_id") != key_id(cluster_key):
        _refuse("signed with another cluster's key")
    try:
        expected = _mac(data, cluster_key, scope)
    except RecursionError:
        _refuse("nested too deeply")
    if not hmac.compare_digest(mac.encode("utf-8", "replace"), expected.encode()):
        _refuse("they were changed, or issued for another use")
    return _from_json(data)


@functools.lru_cache(maxsize=8)
def key_id(cluster_key: str) -> str:
    """Which key signed, without telling the key: 8 hex digits."""
    return hashlib.sha256(b"baton key id" + cluster_key.encode()).hexdigest()[:8]


def encode_incarnation(incarnation: Incarnation) -> str:
    """Text for JSON, where 64-bit integers lose bits (C1)."""
    return base64.urlsafe_b64encode(struct.pack(">Q", incarnation)).decode()


def decode_incarnation(text: str) -> Incarnation:
    """Undo `encode_incarnation`.

    Raises:
        InvalidRequest: the text is none of its results.
    """
    try:
        raw = base64.b64decode(text, altchars=b"-_", validate=True)
        return Incarnation(struct.unpack(">Q", raw)[0])
    except (ValueError, struct.error):
        _refuse("incarnation is not readable")


def _to_json(params: KvTransferParams) -> dict[str, Any]:
    return {**params.extra, **{name: getattr(params, name) for name in _NAMES}}


def _mac(data: Mapping[str, object], cluster_key: str, scope: str) -> str:
    covered = {name: value for name, value in data.items() if name != "mac"}
    canonical = json.dumps(covered, sort_keys=True, separators=(",", ":")).encode()
    scope_bytes = scope.encode()
    message = _DOMAIN + struct.pack("<Q", len(scope_bytes)) + scope_bytes + canonical
    return hmac.new(cluster_key.encode(), message, hashlib.sha256).hexdigest()


def _parse(text: str) -> dict[str, object]:
    if len(text) > MAX_TEXT_BYTES:
        _refuse("too long")
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        _refuse("not a JSON object with distinct names")
    if not isinstance(data, dict):
        _refuse("not a JSON object with distinct names")
    return data


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a name twice")  # two readers could see two different objects
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _from_json(data: Mapping[str, Any]) -> KvTransferParams:
    missing = sorted(_NAMES - data.keys())
    if missing:
        _refuse(f"{', '.join(missing)} missing")
    ids = data["remote_block_ids"]
    if type(ids) is not list or any(type(block) is not int for block in ids):
        _refuse("remote_block_ids is not a list of integers")
    values: dict[str, Any] = {"remote_block_ids": tuple(ids)}
    for name, kind in _JSON_TYPES.items():
        if type(data[name]) is not kind:
            _refuse(f"{name} is not of type {kind.__name__}")
        values[name] = data[name]
    if values["protocol_version"] != PROTOCOL_VERSION:
        _refuse(
            f"protocol version: here {PROTOCOL_VERSION}, theirs is {values['protocol_version']}"
        )
    extra = {name: value for name, value in data.items() if name not in _NAMES}
    return KvTransferParams(**values, extra=extra)


_JSON_TYPES: Mapping[str, type] = {
    "transfer_id": str,
    "incarnation": str,
    "prompt_digest": str,
    "semantic_hash": str,
    "remote_engine_id": str,
    "remote_host": str,
    "remote_port": int,
    "remote_request_id": str,
    "remote_num_tokens": int,
    "lease_ms": int,
    "do_remote_prefill": bool,
    "do_remote_decode": bool,
    "tp_size": int,
    "protocol_version": int,
    "key_id": str,
    "mac": str,
}
_NAMES = {"remote_block_ids", *_JSON_TYPES}  # all but `extra`


def _refuse(why: str) -> NoReturn:
    raise InvalidRequest(f"kv_transfer_params: {why}", param="kv_transfer_params") from None
