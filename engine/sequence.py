"""One sequence of tokens with its KV blocks, and what a handoff reserves for one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from contracts.events import TokenLogprob
from contracts.ids import RequestId
from contracts.request import GenerationRequest
from engine.block_pool import block_key, root_key
from engine.guide import Guide
from engine.plan import Stream

if TYPE_CHECKING:
    from engine.beam_group import BeamGroup


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


def extend_keys(
    keys: list[bytes], token_ids: list[int], block_size: int, cache_salt: str, count: int
) -> None:
    """Lengthen `keys` to the keys of the first `count` full blocks of `token_ids`."""
    while len(keys) < count:
        start = len(keys) * block_size
        parent = keys[-1] if keys else root_key(cache_salt)
        keys.append(block_key(parent, token_ids[start : start + block_size]))


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens [0, num_computed) have their KV in `block_ids`, in order; the rest are pending.

    `choices` are those its next draw is for: all choices of the request while the prompt is
    computed, exactly one afterwards. Only `Scheduler.commit` moves `num_computed`; only the engine
    thread touches a Sequence.

    With beams it is one beam, `choices` its place among them (0 while the prompt is computed).
    Once it has `candidates` for its next token it waits for the others of its `group`: then all
    its tokens are computed, or its blocks were taken away.

    `stream` is there while it runs, has drawn, is no beam, and exactly its last token is pending:
    what most sequences are most of the time. It is over once one of `ends` is drawn, or the token
    that makes `token_ids` `max_length` long.
    """

    key: int
    request: GenerationRequest
    choices: tuple[int, ...]
    token_ids: list[int]
    arrival: int
    guide: Guide | None = None
    export: bool = False  # prefill only: the blocks go to a D
    scored: bool = False  # prompt tokens are left whose log-probabilities are to be told
    started: bool = False  # has been given blocks before
    stream: Stream | None = None
    num_computed: int = 0
    block_ids: tuple[int, ...] = ()
    block_keys: list[bytes] = field(default_factory=list[bytes])
    num_remembered: int = 0  # leading blocks already in the prefix cache
    # What is asked of the request at every draw.
    num_prompt: int = field(init=False)
    looks_back: bool = field(init=False)
    ends: frozenset[int] = field(init=False)
    max_length: int = 0  # known once it is a stream
    group: "BeamGroup | None" = None
    candidates: TokenLogprob | None = None

    def __post_init__(self) -> None:
        params = self.request.params
        self.num_prompt = len(self.request.prompt_ids)
        self.looks_back = params.looks_back
        self.ends = frozenset(params.eos_token_ids + params.stop_token_ids)

    @property
    def num_outputs(self) -> int:
        """Output tokens so far: the position of the next one."""
        return len(self.token_ids) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed before the next draw."""
        return len(self.token_ids) - self.num_computed

    @property
    def order(self) -> tuple[int, int, int]:
        """Earlier is served first and preempted last."""
        return self.request.priority, self.arrival, self.choices[0]


@dataclass(slots=True, eq=False)
class Reservation:
    """Blocks promised to one arriving handoff (rule M2): all or none.

    `blocks` hold prompt + 1 tokens in order; the first `num_hits` were in D's own prefix cache and
    need no reading. `spare` has one block for each further choice.
    """

    request: GenerationRequest
    blocks: list[int]
    num_hits: int
    spare: list[int]
    block_keys: list[bytes]
    on_reclaimed: Callable[[], None] | None = None
    _lock: Lock = field(default_factory=Lock)
    _pinned: bool = False
    _reclaimed: bool = False

    def pin(self) -> bool:
        """Its holder is about to use it; False: the engine has taken it back. Any thread."""
        with self._lock:
            self._pinned = not self._reclaimed
            return self._pinned

    def reclaim(self) -> bool:
        """The engine takes it back; False: it is in use, or has been taken back before (M3)."""
        with self._lock:
            if self._pinned or self._reclaimed:
                return False
            self._reclaimed = True
            return True

    @property
    def reclaimed(self) -> bool:
        """Whether the engine has taken it back."""
        return self._reclaimed


@dataclass(frozen=True, slots=True)
class Started:
    """A request was given all its prompt's blocks (M1) and its first chunk is planned."""

    request_id: RequestId
    attempt: int
    block_ids: tuple[int, ...]
    cached_tokens: int
    export: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """KV of the first `computed_tokens` tokens of an exported prompt is complete (F2)."""

    request_id: RequestId
    attempt: int
    computed_tokens: int
