"""What it costs to plan and to commit a step of running decodes. Nothing is computed."""

import random
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.micro_clock import Effort
from benchmarks.micro_engine import ENDLESS, publish
from contracts.events import TokensOut
from contracts.ids import new_request_id
from contracts.request import GenerationRequest
from engine.block_pool import BlockPool
from engine.generations import GenerationWords
from engine.plan import Sampled, StepResult
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import blocks_for

_BLOCK_SIZE = 16
_VOCAB = 32_000
_TOKEN = 5  # any: greedy draws have no ends here


@dataclass(frozen=True, slots=True)
class SchedulerFigures:
    """Medians for one step, in microseconds. `publish` is done twice a step, here together."""

    running: int
    context: int
    whole_us: float
    schedule_us: float
    commit_us: float
    publish_us: float
    us_per_sequence: float


def scheduler_figures(running: int, context: int, effort: Effort, seed: int) -> SchedulerFigures:
    """Measure `running` plain greedy decodes after `context` tokens."""
    scheduler = _running(running, context, effort.repeats + 2, random.Random(seed))
    clock = time.perf_counter
    found: list[tuple[float, float, float]] = []
    began = clock()
    while effort.goes_on(len(found) - 2, began):  # two to warm up
        times = [clock()]
        plan = scheduler.schedule()
        times.append(clock())
        publish(scheduler)
        times.append(clock())
        assert plan.num_tokens == running, "a sequence was left out"
        others = tuple([Sampled(_TOKEN) for chunk in plan.others for _ in chunk.slots])
        result = StepResult(others, tokens=[_TOKEN] * len(plan.decodes))
        times.append(clock())
        scheduler.commit(plan, result)
        times.append(clock())
        publish(scheduler)
        times.append(clock())
        schedule, first, _, commit, second = ((end - start) * 1e6 for start, end in pairwise(times))
        found.append((schedule, commit, first + second))
    kept = found[2:]
    whole = statistics.median(sum(one) for one in kept)
    schedule, commit, news = (statistics.median(column) for column in zip(*kept, strict=True))
    return SchedulerFigures(running, context, whole, schedule, commit, news, whole / running)


def _running(count: int, context: int, steps: int, draw: random.Random) -> Scheduler:
    length = context + steps + 2
    num_blocks = (count + 1) * (blocks_for(length, _BLOCK_SIZE) + 1)
    config = SchedulerConfig(_BLOCK_SIZE, max_model_len=length, max_running=count)
    scheduler = Scheduler(config, BlockPool(num_blocks, GenerationWords(num_blocks, 1)))
    for _ in range(count):
        prompt = tuple(draw.randrange(_VOCAB) for _ in range(context))
        request = GenerationRequest(new_request_id(), prompt, ENDLESS)
        first = TokensOut(request.request_id, request.attempt, 0, 0, (prompt[0],))
        scheduler.adopt(scheduler.reserve(request), [first])
    publish(scheduler)
    return scheduler
