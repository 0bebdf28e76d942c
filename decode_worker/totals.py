"""What a D has done for handoffs over its life."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class HandoffStats:
    """What a handoff moved."""

    num_bytes: int = 0
    num_descriptors: int = 0
    read_s: float = 0.0
    hit_blocks: int = 0

    def plus(self, num_bytes: int, num_descriptors: int, read_s: float) -> "HandoffStats":
        """With one more read."""
        return HandoffStats(
            self.num_bytes + num_bytes,
            self.num_descriptors + num_descriptors,
            self.read_s + read_s,
            self.hit_blocks,
        )


@dataclass(slots=True)
class HandoffTotals:
    """Counters. `recompute_causes`: by the error's class."""

    adopted: int = 0
    recomputed: int = 0
    num_bytes: int = 0
    num_descriptors: int = 0
    read_s: float = 0.0
    hit_blocks: int = 0
    recompute_causes: dict[str, int] = field(default_factory=dict[str, int])

    def add_joined(self, stats: HandoffStats) -> None:
        """A handoff has joined."""
        self.adopted += 1
        self.num_bytes += stats.num_bytes
        self.num_descriptors += stats.num_descriptors
        self.read_s += stats.read_s
        self.hit_blocks += stats.hit_blocks

    def add_recomputed(self, cause: str) -> None:
        """One has failed, and its prompt is computed here."""
        self.recomputed += 1
        self.recompute_causes[cause] = self.recompute_causes.get(cause, 0) + 1

    def status(self) -> dict[str, object]:
        """For people and tests."""
        return {
            "adopted": self.adopted,
            "recomputed": self.recomputed,
            "recompute_causes": dict(self.recompute_causes),
            "num_bytes": self.num_bytes,
            "num_descriptors": self.num_descriptors,
            "read_s": self.read_s,
            "gigabytes_per_s": self.num_bytes / self.read_s / 1e9 if self.read_s else 0.0,
            "hit_blocks": self.hit_blocks,
        }
