"""What is measured, as pure functions of time stamps.

Letters used below: `a` intended arrival, `s` actual send, `c_k` arrival of the k-th chunk that
carries tokens, `m_k` its tokens, `n` completion tokens by `usage`. All times are seconds from the
start of the measured window, so warm-up stamps are negative.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


class Phase(StrEnum):
    """Where an arrival lies. Only those of the window are measured."""

    WARMUP = "warmup"
    WINDOW = "window"
    TAIL = "tail"  # keeps the load up until the window's requests have all ended


@dataclass(frozen=True, slots=True)
class Chunk:
    """One streamed chunk that carried tokens."""

    at_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """Raw stamps of one request; every figure is computed from these.

    `error` is empty for a request that ended as asked. `end_s` is when the stream ended ([DONE],
    failure or our giving up), None only if it was never sent.
    """

    index: int
    phase: Phase
    intended_s: float
    wanted_tokens: int
    sent_s: float | None = None
    chunks: tuple[Chunk, ...] = ()
    end_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ended as asked and carried tokens."""
        return not self.error and bool(self.chunks)

    @property
    def send_lag_s(self) -> float | None:
        """How late the client itself was: s - a."""
        return None if self.sent_s is None else self.sent_s - self.intended_s

    @property
    def ttft_s(self) -> float | None:
        """c_1 - a: from the intended arrival, so a late client cannot hide a slow server."""
        return self.chunks[0].at_s - self.intended_s if self.chunks else None

    @property
    def ttft_wire_s(self) -> float | None:
        """c_1 - s."""
        return (
            self.chunks[0].at_s - self.sent_s if self.chunks and self.sent_s is not None else None
        )

    @property
    def tpot_s(self) -> float | None:
        """(c_last - c_1) / (n - m_1); None where all tokens came at once."""
        later = self.completion_tokens - self.chunks[0].tokens if self.chunks else 0
        return (self.chunks[-1].at_s - self.chunks[0].at_s) / later if later > 0 else None

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """c_{k+1} - c_k. The first is TT2T, all together are the ITL."""
        stamps = [chunk.at_s for chunk in self.chunks]
        return tuple(late - early for early, late in pairwise(stamps))

    @property
    def tt2t_s(self) -> float | None:
        """c_2 - c_1: a handoff after token 1 sits in this gap."""
        return self.gaps_s[0] if len(self.chunks) > 1 else None

    @property
    def handoff_overhead_s(self) -> float | None:
        """How much longer the first gap is than the median of the later ones."""
        gaps = self.gaps_s
        return max(0.0, gaps[0] - percentile(gaps[1:], 50)) if len(gaps) > 1 else None

    @property
    def e2e_s(self) -> float | None:
        """c_last - a."""
        return self.chunks[-1].at_s - self.intended_s if self.chunks else None


@dataclass(frozen=True, slots=True)
class Limits:
    """Service level objectives in seconds; None: no such limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def met_by(self, record: RequestRecord) -> bool:
        """Errors and short outputs miss; an undefined TPOT (all tokens at once) does not."""
        return record.ok and all(
            limit is None or value is None or value <= limit
            for limit, value in (
                (self.ttft_s, record.ttft_s),
                (self.tpot_s, record.tpot_s),
                (self.e2e_s, record.e2e_s),
            )
        )


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A sample in short, in the sample's unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    maximum: float


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) with linear interpolation between ranks.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100.0
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def quantiles(values: Iterable[float | None]) -> Quantiles | None:
    """Of the values that are defined; None if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Quantiles(
        count=len(known),
        mean=math.fsum(known) / len(known),
        p50=percentile(known, 50),
        p90=percentile(known, 90),
        p99=percentile(known, 99),
        maximum=max(known),
    )


def wilson_interval(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (95 % with the default z)."""
    if trials == 0:
        return 0.0, 1.0
    share = hits / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    half = z * spread / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_concurrency(records: Iterable[RequestRecord], window_s: float) -> float:
    """Time average over [0, window_s) of the requests between intended arrival and end.

    Counts all phases: a request of the warm-up that still runs is load like any other.
    """
    busy_s = math.fsum(
        max(0.0, min(record.end_s, window_s) - max(record.intended_s, 0.0))
        for record in records
        if record.end_s is not None
    )
    return busy_s / window_s


def tokens_in_window(records: Iterable[RequestRecord], window_s: float) -> int:
    """Tokens that arrived in [0, window_s), whichever request they belong to."""
    return sum(
        chunk.tokens
        for record in records
        for chunk in record.chunks
        if 0.0 <= chunk.at_s < window_s
    )


def gap_cv(arrivals_s: Sequence[float]) -> float | None:
    """Coefficient of variation of the gaps (Poisson: 1); None below three arrivals."""
    gaps = [late - early for early, late in pairwise(arrivals_s)]
    if len(gaps) < 2:
        return None
    mean = math.fsum(gaps) / len(gaps)
    variance = math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    return math.sqrt(variance) / mean if mean > 0 else None


def index_of_dispersion(arrivals_s: Sequence[float], window_s: float, bin_s: float) -> float | None:
    """Variance over mean of the arrivals per bin (Poisson: 1); None below two whole bins."""
    bins = math.floor(window_s / bin_s)
    if bins < 2:
        return None
    counts = [0] * bins
    for arrival in arrivals_s:
        if 0.0 <= arrival < bins * bin_s:
            counts[math.floor(arrival / bin_s)] += 1
    mean = sum(counts) / bins
    return sum((count - mean) ** 2 for count in counts) / bins / mean if mean > 0 else None


def spread_tokens(num_chunks: int, num_tokens: int) -> tuple[int, ...]:
    """Tokens per chunk where the server does not say: one in the first, the rest evenly.

    Sums to `num_tokens` if there is any chunk and at least one token.
    """
    if num_chunks == 0 or num_tokens == 0:
        return (0,) * num_chunks
    if num_chunks == 1:
        return (num_tokens,)
    later, chunks = num_tokens - 1, num_chunks - 1
    return 1, *(later * (k + 1) // chunks - later * k // chunks for k in range(chunks))
