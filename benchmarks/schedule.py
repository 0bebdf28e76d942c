"""Which request is sent when: seeded, and independent of how the server does."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.metrics import Phase

VOCABULARY = """
about above across after again air all almost alone along also always among and animal another
answer any around ask away back bank bear because bed before begin behind best better between big
bird black blue boat body book both box bread bring brother brown build but call came car carry
cat cause chair change child city clean clear close cloud cold come cook cool corn could count
country cover cross cry cut dance dark day deep desk dinner dog door down draw dream dress drink
drive dry each ear early earth east eat edge egg eight end enough even evening ever every eye face
fact fall family far farm fast father feel feet few field fill find fine fire first fish five floor
flower fly follow food foot for forest form forward four free friend from front full game garden
gave girl give glass gold gone good grass great green ground group grow half hand happy hard have
head hear heart heat heavy help here high hill hold home horse hot hour house how hundred ice idea
"""
WORDS = VOCABULARY.split()


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Token counts to draw from, both ends included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "TokenRange":
        """From `512` or `256-1024`.

        Raises:
            ValueError: anything else, zero, or low > high.
        """
        low, _, high = text.partition("-")
        parsed = cls(int(low), int(high or low))
        if not 1 <= parsed.low <= parsed.high:
            raise ValueError(f"not a range of token counts: {text}")
        return parsed

    def draw(self, dice: random.Random) -> int:
        """One count, uniformly."""
        return dice.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class PromptScale:
    """How this server counts our words: tokens = overhead + per_word * words (measured)."""

    overhead_tokens: float
    tokens_per_word: float

    @classmethod
    def from_probes(cls, few: tuple[int, int], many: tuple[int, int]) -> "PromptScale":
        """From two (words, prompt tokens) pairs; a server that counts nothing gives 1 per word."""
        (few_words, few_tokens), (many_words, many_tokens) = few, many
        per_word = (many_tokens - few_tokens) / (many_words - few_words)
        if per_word <= 0:
            return cls(0.0, 1.0)
        return cls(few_tokens - per_word * few_words, per_word)

    def words_for(self, tokens: int) -> int:
        """As many words as come nearest to `tokens`, at least one."""
        return max(1, round((tokens - self.overhead_tokens) / self.tokens_per_word))


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One arrival. `intended_s` counts from the start of the measured window."""

    index: int
    phase: Phase
    intended_s: float
    wanted_tokens: int
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of the server; with the same fields, the same requests at the same times.

    `salt` starts every prompt, so that nothing is found in a prefix cache but what
    `shared_prefix_tokens` puts there.
    """

    model: str
    rate_per_s: float
    prompt_tokens: TokenRange
    output_tokens: TokenRange
    seed: int
    salt: str
    scale: PromptScale
    warmup_s: float = 0.0
    duration_s: float | None = None  # exactly one of these two is set
    num_requests: int | None = None
    shared_prefix_tokens: int = 0

    def window_s(self) -> float:
        """Length of the measured window.

        A count of requests ends it at the arrival after the last: that gap belongs to it as all
        others do.
        """
        if self.num_requests is None:
            assert self.duration_s is not None
            return self.duration_s
        return next(at_s for phase, at_s in self.arrivals() if phase is Phase.TAIL)

    def arrivals(self) -> Iterator[tuple[Phase, float]]:
        """Poisson arrivals, without end, in seconds from the start of the window."""
        clock = random.Random(f"arrivals {self.seed}")
        arrival_s = -self.warmup_s
        in_window = 0
        while True:
            arrival_s += clock.expovariate(self.rate_per_s)
            if arrival_s < 0:
                phase = Phase.WARMUP
            elif self.num_requests is not None:
                phase = Phase.WINDOW if in_window < self.num_requests else Phase.TAIL
            else:
                assert self.duration_s is not None
                phase = Phase.WINDOW if arrival_s < self.duration_s else Phase.TAIL
            in_window += phase is Phase.WINDOW
            yield phase, arrival_s

    def requests(self) -> Iterator[PlannedRequest]:
        """The arrivals with their prompts, each built when it is asked for."""
        for index, (phase, arrival_s) in enumerate(self.arrivals()):
            dice = random.Random(f"request {self.seed} {index}")
            prompt_tokens, wanted = self.prompt_tokens.draw(dice), self.output_tokens.draw(dice)
            body = self.body(self._prompt(prompt_tokens, index), wanted)
            yield PlannedRequest(index, phase, arrival_s, wanted, body)

    def _prompt(self, num_tokens: int, index: int) -> str:
        shared = min(self.shared_prefix_tokens, num_tokens - 1)
        words = random_words(f"{self.salt} shared", shared / self.scale.tokens_per_word)
        own = self.scale.words_for(num_tokens) - len(words)
        return " ".join(words + random_words(f"{self.salt} {self.seed} {index}", max(1, own)))

    def body(self, prompt: str, output_tokens: int) -> bytes:
        """The serialised chat completion request: streamed, of exactly that many tokens."""
        return json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
        ).encode()


def random_words(seed: str, count: float) -> list[str]:
    """That many common words (rounded), drawn from `seed`."""
    return random.Random(seed).choices(WORDS, k=round(count))
