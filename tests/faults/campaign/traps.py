"""What the hooks of a worker act on: see hooks.py."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from kv_transfer.connector import ReadHandle
from kv_transfer.layout import Region

MAX_HELD_S = 10.0


@dataclass(eq=False)
class Trap:
    """Stops a request whose id begins with `prefix`, the `skip`-th time after the first."""

    number: int
    point: str
    prefix: str
    skip: int
    hit: bool = False
    opened: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class Reading:
    """`count` reads of `kind` (empty: any) fail, or land `late_s` after they were posted."""

    kind: str
    count: int
    late_s: float = 0.0  # 0: they fail
    until: float = 0.0


class Named(tuple[Region, ...]):
    """Regions that know whose read they are for: it is posted in another thread."""

    request: str = ""


@dataclass(eq=False)
class Late:
    """A read that is posted later, as if the network had it: when due, or a trap has opened."""

    due: float
    post: Callable[[], ReadHandle]
    trap: Trap | None = None
    real: ReadHandle | None = None
