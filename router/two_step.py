"""The two-step form of a handoff, driven from outside (vLLM's NIXL connector has the same one).

A first request with `do_remote_decode` is computed by a P, which keeps the KV under a lease; its
answer has one token, not to be used, and `kv_transfer_params`. A second request with the same
prompt brings these back: a D takes the KV over and draws every token itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from contracts.errors import InvalidRequest
from contracts.sampling import SamplingParams

_FIELD = "kv_transfer_params"


class Step(StrEnum):
    """Which of the two."""

    EXPORT = "export"  # do_remote_decode
    ADOPT = "adopt"  # do_remote_prefill


@dataclass(frozen=True, slots=True)
class Transfer:
    """One step. `params` is the JSON text for the D; the P's cached tokens came with it."""

    step: Step
    params: str = ""
    semantic_hash: str | None = None
    cached_tokens: int = 0


def read_transfer(params: Mapping[str, Any] | None, *, stream: bool, beam: bool) -> Transfer | None:
    """Which step a request is; None: neither. The workers check what the params say.

    Raises:
        InvalidRequest: both at once, or a step that cannot be taken that way.
    """
    if not params:
        return None
    export, adopt = (_flag(params, name) for name in ("do_remote_decode", "do_remote_prefill"))
    if not export and not adopt:
        return None
    if export and adopt:
        raise InvalidRequest(
            f"{_FIELD}: only one of do_remote_decode and do_remote_prefill", _FIELD
        )
    if beam:
        raise InvalidRequest(f"use_beam_search cannot be used with {_FIELD}", "use_beam_search")
    if export:
        if stream:
            raise InvalidRequest(f"{_FIELD}.do_remote_decode needs stream: false", _FIELD)
        return Transfer(Step.EXPORT)
    digest, cached = params.get("semantic_hash"), params.get("remote_prefill_cached_tokens")
    if not isinstance(digest, str) or not digest:
        raise InvalidRequest(
            f"{_FIELD} lack semantic_hash: send back what the prefill answered, unchanged", _FIELD
        )
    if not isinstance(cached, int) or isinstance(cached, bool) or cached < 0:
        cached = 0
    text = json.dumps(dict(params), separators=(",", ":"))
    return Transfer(Step.ADOPT, text, digest, cached)


def _flag(params: Mapping[str, Any], name: str) -> bool:
    value = params.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{_FIELD}.{name} must be true or false", _FIELD)
    return bool(value)


def settle(
    transfer: Transfer | None, params: SamplingParams
) -> tuple[Transfer | None, SamplingParams]:
    """The step that will be taken, and what its answer is held to.

    An export's answer is one choice of one token. The prompt's log-probabilities are those of
    whoever computes it, so an adoption that wants them is computed anew; P's lease runs out.
    """
    if transfer is None or (transfer.step is Step.ADOPT and params.prompt_logprobs is not None):
        return None, params
    if transfer.step is Step.EXPORT:
        return transfer, replace(params, n=1, max_tokens=1, min_tokens=0)
    return transfer, params


def computed(params: SamplingParams) -> SamplingParams:
    """What the P of an export is given: its draw must not end the request, for a D goes on."""
    return replace(
        params,
        n=1,
        max_tokens=2,
        min_tokens=0,
        eos_token_ids=(),
        stop_token_ids=(),
        grammar=None,
        processors=(),
    )
