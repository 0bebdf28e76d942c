"""One cluster's part of a campaign: its runs one after the other, in a process of its own."""

import asyncio
import gc
import logging
import os
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import uvloop

from tests.faults.campaign.channel import Served
from tests.faults.campaign.client import Json
from tests.faults.campaign.cluster import DECODES, ROUTERS, WORKERS, Cluster, Settings
from tests.faults.campaign.faults import LIGHT, Fault
from tests.faults.campaign.outages import HEAVY
from tests.faults.campaign.run import Outcome, Run
from tests.faults.campaign.traffic import Question, check_plain, expectations, questions

FAULTS = {fault.name: fault for fault in (*LIGHT, *HEAVY)}
_COUNTED = re.compile(
    r"^baton:(path|retries|replays|token_faults)_total(?:{path=\"(\w+)\"})? (\S+)"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """What one cluster is to do. `no_fence`: D's do not look at generations, a deliberate bug."""

    seed: int
    indices: Sequence[int]
    fault: str = ""
    no_fence: bool = False
    check_reference: bool = True
    pool: int = 150


def fault_of(part: Part, index: int) -> Fault:
    """Which fault a run gets: by seed and index alone. The first runs have each of them once."""
    if part.fault:
        return FAULTS[part.fault]
    every = list(FAULTS.values())
    if index < len(every):
        return random.Random(f"faults {part.seed}").sample(every, len(every))[index]
    draws = random.Random(f"fault {part.seed} {index}")
    return draws.choices(every, [fault.weight for fault in every])[0]


def runner(sock: socket.socket, settings: Settings, part: Part) -> None:
    """Run the part; outcomes go out as events. Ends with the channel."""
    log_path = settings.folder / "runner.log"
    settings.folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        loop.run(_serve(sock, settings, part))


async def _serve(sock: socket.socket, settings: Settings, part: Part) -> None:
    served = Served({})
    await served.attach(sock)
    working = asyncio.create_task(_work(served, settings, part))
    over = asyncio.create_task(served.over.wait())
    await asyncio.wait({working, over}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        working.cancel()
        await asyncio.wait({working}, timeout=10)
        return
    error = working.exception()
    if error is not None:
        log.error("the work ended", exc_info=error)
    served.tell("end", "" if error is None else f"{type(error).__name__}: {error}")
    await served.over.wait()


async def _work(served: Served, settings: Settings, part: Part) -> None:
    pool = questions(part.seed, part.pool)
    expected: dict[int, Json] = {}
    cluster: Cluster | None = None
    generation = 0
    try:
        for index in part.indices:
            if cluster is None:
                generation += 1
                folder = settings.folder / f"cluster-{generation}"
                cluster = Cluster(replace(settings, folder=folder))
                await cluster.start()
                if not expected:
                    expected = await expectations(cluster, pool)
                    if part.check_reference:
                        checked = await check_plain(cluster, settings.model, pool, expected)
                        log.info("%d answers are those of the stock model", checked)
                    await cluster.idle(10.0)
                    served.tell("expected", expected)
            outcome = await one(cluster, pool, expected, part, index)
            if outcome.failures:
                outcome.failures.append(f"logs: {cluster.settings.folder}")
            served.tell("outcome", outcome)
            if outcome.failures:
                await cluster.close()
                cluster = None
    finally:
        if cluster is not None:
            await cluster.close()


async def one(
    cluster: Cluster, pool: Sequence[Question], expected: dict[int, Json], part: Part, index: int
) -> Outcome:
    """One run, all checks included. Never raises."""
    began = time.monotonic()
    run = Run(cluster, pool, expected, part.seed, index)
    fault = fault_of(part, index)
    outcome = run.outcome
    outcome.fault = fault.name
    log.info("run %d: %s", index, fault.name)
    try:
        if part.no_fence:
            await cluster.ask(DECODES, "no_fence")
        before = await _counters(cluster)
        run.choose(run.draws.randint(2, 8))
        await fault.work(run)
        await run.finish()
        run.check()
        await run.settle()
        after = await _counters(cluster)
        for name, counts in after.items():
            known = before.get(name, Counter[str]())
            outcome.served += counts - known  # of who was restarted, only what came after
        if outcome.served["token_faults"]:
            run.fail(f"{outcome.served['token_faults']} contradicting tokens")
    except Exception as error:
        log.exception("run %d", index)
        run.fail(f"{type(error).__name__}: {error}")
        for asked in run.asked:
            if asked.task is not None:
                asked.task.cancel()
    outcome.failures += cluster.complaints
    cluster.complaints.clear()
    outcome.seconds = time.monotonic() - began
    for failure in outcome.failures:
        log.error("run %d (%s): %s", index, fault.name, failure)
    return outcome


async def _counters(cluster: Cluster) -> dict[str, Counter[str]]:
    """How requests were served so far, by process start."""
    found: dict[str, Counter[str]] = {}
    for name, text in (await cluster.ask(ROUTERS, "metrics")).items():
        counts: Counter[str] = Counter()
        for line in text.splitlines():
            match = _COUNTED.match(line)
            if match:
                counts[match[2] or match[1]] += int(float(match[3]))
        found[f"{name} {cluster[name].starts}"] = counts
    for name, state in (await cluster.ask(WORKERS, "status")).items():
        causes = state.get("handoffs", {}).get("recompute_causes", {})
        found[f"{name} {cluster[name].starts}"] = Counter(
            {f"cause {cause}": count for cause, count in causes.items()}
        )
    return found


def default_folder(base: Path, number: int) -> Path:
    """Where a cluster keeps its logs."""
    return base / f"runner-{number}"
