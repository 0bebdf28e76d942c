"""Does anything grow? Rules over what was measured at idle points; pure functions, no eye needed.

At an idle point nothing runs, so counts (descriptors, sockets, processes) must be equal. Threads
may differ by what Python's pools start when they first have that much to do at once.
Memory is never equal: allocators keep what they may need again. So a line is fitted that stray
points cannot tilt (Theil and Sen: the median of the slopes of all pairs), and memory grows if

* it rises by more than SLOPE_MIB_H, and
* by more than FLOOR_MIB and NOISES times the scatter around the line in what was judged, and
* it still rises in the later half: filling a cache or an arena ends, a leak does not.

The first third of a run is warm-up: caches fill, pools of threads come to their size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import TypeVar

WARM_UP = 1 / 3
SLOPE_MIB_H = 8.0
FLOOR_MIB = 4.0
NOISES = 3.0
MIN_POINTS = 6  # of memory; fewer tell nothing
_MIB = 1 << 20

T = TypeVar("T")
Points = Sequence[tuple[float, float]]  # seconds, bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """One quantity of one process: flat, or why not."""

    process: str
    quantity: str
    flat: bool
    first: float  # of what was judged; bytes for memory
    last: float
    slope_mib_h: float | None = None  # memory only, None: too few points
    detail: str = ""


def after_warm_up(points: Sequence[T]) -> Sequence[T]:
    """What is judged."""
    return points[math.ceil(len(points) * WARM_UP) :]


def judge_count(process: str, quantity: str, values: Sequence[int], room: int = 0) -> Finding:
    """Equal at every idle point after the warm-up, or no further apart than `room`."""
    judged = after_warm_up(values)
    if not judged:
        return Finding(process, quantity, True, 0, 0, detail="no idle point")
    seen = sorted(set(judged))
    flat = seen[-1] - seen[0] <= room
    detail = "" if flat else f"between {seen[0]} and {seen[-1]} at idle points"
    return Finding(process, quantity, flat, judged[0], judged[-1], detail=detail)


def judge_memory(process: str, quantity: str, points: Points) -> Finding:
    """No growth after the warm-up, by the rule above."""
    judged = after_warm_up(points)
    if len(judged) < MIN_POINTS:
        ends = (judged[0][1], judged[-1][1]) if judged else (0.0, 0.0)
        return Finding(process, quantity, True, *ends, detail="too few points to judge")
    slope = theil_sen(judged)  # bytes/s
    span_s = judged[-1][0] - judged[0][0]
    grown = slope * span_s
    noise = scatter(judged, slope)
    late = theil_sen(judged[len(judged) // 2 :])
    limit = SLOPE_MIB_H * _MIB / 3600
    least = max(FLOOR_MIB * _MIB, NOISES * noise)
    grows = slope > limit and grown > least and late > limit
    detail = (
        f"grew {grown / _MIB:.1f} MiB in {span_s / 60:.0f} min, still "
        f"{late * 3600 / _MIB:.1f} MiB/h in the later half (scatter {noise / _MIB:.1f} MiB)"
        if grows
        else ""
    )
    per_hour = slope * 3600 / _MIB
    return Finding(process, quantity, not grows, judged[0][1], judged[-1][1], per_hour, detail)


def theil_sen(points: Points) -> float:
    """The median slope of all pairs, in units of the values per second."""
    slopes = [(y2 - y1) / (t2 - t1) for (t1, y1), (t2, y2) in combinations(points, 2) if t2 > t1]
    return median(slopes) if slopes else 0.0


def scatter(points: Points, slope: float) -> float:
    """Median distance of the points from the best line of that slope."""
    rests = [y - slope * t for t, y in points]
    middle = median(rests)
    return median(abs(rest - middle) for rest in rests)
