"""Identities. Distinct types, so that a type checker catches a swap (protocol notes, section 1)."""

import secrets
from typing import NewType

RequestId = NewType("RequestId", str)  # the router's own, never the client's
WorkerId = NewType("WorkerId", str)
TransferId = NewType("TransferId", str)  # 128 random bits in hex, one per prefill attempt
BlockId = NewType("BlockId", int)  # index into one worker's pool; meaningless on another worker
Incarnation = NewType("Incarnation", int)  # 63 random bits per process start


def new_incarnation() -> Incarnation:
    """63 random bits that name one start of one process (63: fits a signed 64-bit field)."""
    return Incarnation(secrets.randbits(63))


def new_transfer_id() -> TransferId:
    """128 random bits in hex; a retry is a new transfer."""
    return TransferId(secrets.token_hex(16))


def new_request_id() -> RequestId:
    """96 random bits in hex."""
    return RequestId(secrets.token_hex(12))
