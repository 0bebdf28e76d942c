"""Token and block ids as bytes: little-endian unsigned 32-bit integers (S5)."""

import sys
from array import array
from collections.abc import Iterable

from contracts.errors import InvalidRequest

assert array("I").itemsize == 4


def pack_ids(ids: Iterable[int]) -> bytes:
    """Unsigned 32-bit integers as little-endian bytes.

    Raises:
        OverflowError: one does not fit.
    """
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> tuple[int, ...]:
    """The reverse of `pack_ids`.

    Raises:
        InvalidRequest: the length is no multiple of 4.
    """
    if len(data) % 4:
        raise InvalidRequest(f"packed ids of {len(data)} bytes: no multiple of 4")
    packed = array("I", data)
    if sys.byteorder == "big":
        packed.byteswap()
    return tuple(packed)
