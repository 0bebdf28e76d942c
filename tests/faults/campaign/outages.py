"""The faults of processes and wires."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable

from tests.faults.campaign.cluster import DECODES, PREFILLS, ROUTERS, WORKERS
from tests.faults.campaign.faults import MOMENTS, Fault, at_moment
from tests.faults.campaign.proxy import Way
from tests.faults.campaign.run import Run

_WAYS: tuple[tuple[Way, ...], ...] = (("up",), ("down",), ("up", "down"))


async def _one_of(run: Run, names: tuple[str, ...], at: str) -> str:
    """The worker of that kind which has to do with the victim; else any."""
    if at in names:
        return at
    holders = await run.holders(run.victim, names)
    return holders[0] if holders else run.draws.choice(names)


def killed(names: tuple[str, ...]) -> Callable[[Run], Awaitable[None]]:
    """SIGKILL at a moment of the victim."""

    async def work(run: Run) -> None:
        async def strike(at: str) -> None:
            run.cluster.kill(await _one_of(run, names, at))
            await asyncio.sleep(run.draws.choice((0.0, 0.02, 0.3)))

        await at_moment(run, run.draws.choice(MOMENTS), strike)

    return work


async def router_killed(run: Run) -> None:
    """Its clients see their streams end; the others notice nothing."""
    name = run.draws.choice(ROUTERS)
    run.start()
    await asyncio.sleep(run.draws.uniform(0.0, 0.15))
    concerned = [asked for asked in run.asked if asked.router == name and not asked.over]
    run.outcome.struck = bool(concerned)
    now = time.monotonic()
    for asked in concerned:
        asked.may, asked.cut_at = "cut", now
    for asked in run.asked:
        if asked.router == name and asked.task is not None and not asked.client.reply.started_at:
            asked.may, asked.cut_at = "cut", now + 0.1  # not even sent yet
    run.cluster.kill(name)
    await run.released(concerned, "router", "killed", now)


def frozen(names: tuple[str, ...]) -> Callable[[Run], Awaitable[None]]:
    """SIGSTOP for a while, at a moment of the victim."""

    async def work(run: Run) -> None:
        async def strike(at: str) -> None:
            name = await _one_of(run, names, at)
            run.cluster[name].signal(signal.SIGSTOP)
            stopped.append(name)

        stopped: list[str] = []
        await at_moment(run, run.draws.choice(MOMENTS), strike)
        await asyncio.sleep(run.draws.choice((0.2, 0.5, 0.9, 1.4, 2.2, 3.0)))
        for name in stopped:
            run.cluster[name].signal(signal.SIGCONT)

    return work


async def peer_cut(run: Run) -> None:
    """The connections between Ds and Ps are reset."""

    async def strike(at: str) -> None:
        for (d, _), wire in run.cluster.peers.items():
            if at not in DECODES or d == at:
                wire.cut()
        await asyncio.sleep(run.draws.choice((0.0, 0.02, 0.2)))

    await at_moment(run, run.draws.choice(MOMENTS), strike)


async def peer_stalled(run: Run) -> None:
    """Nothing passes between Ds and Ps for a while, one way or both; perhaps reset after that."""
    ways = run.draws.choice(_WAYS)
    wires = list(run.cluster.peers.values())

    async def strike(at: str) -> None:
        for wire in wires:
            wire.stall(*ways)

    await at_moment(run, run.draws.choice(MOMENTS), strike)
    await asyncio.sleep(run.draws.choice((0.1, 0.4, 0.9, 1.5, 2.5)))
    reset = run.draws.random() < 0.3
    for wire in wires:
        if reset:
            wire.cut()
        wire.heal()


async def session_cut(run: Run) -> None:
    """A worker's connections to both routers are reset."""

    async def strike(at: str) -> None:
        name = at or run.draws.choice(WORKERS)
        run.cluster.sessions[name].cut()

    await at_moment(run, run.draws.choice(MOMENTS), strike)


async def session_stalled(run: Run) -> None:
    """Nothing passes between a worker and the routers for a while, one way or both."""
    ways = run.draws.choice(_WAYS)
    stalled: list[str] = []

    async def strike(at: str) -> None:
        name = at or run.draws.choice(WORKERS)
        run.cluster.sessions[name].stall(*ways)
        stalled.append(name)

    await at_moment(run, run.draws.choice(MOMENTS), strike)
    await asyncio.sleep(run.draws.choice((0.1, 0.4, 0.9, 1.5, 2.5)))
    for name in stalled:
        run.cluster.sessions[name].heal()


async def drained(run: Run) -> None:
    """One worker is restarted in an orderly way."""
    run.start()
    await asyncio.sleep(run.draws.uniform(0.0, 0.1))
    run.outcome.struck = True
    await run.cluster.stop(run.draws.choice(WORKERS), run.draws.choice((0.1, 2.0)))


HEAVY = (
    Fault("p_killed", 2.2, killed(PREFILLS)),
    Fault("d_killed", 2.2, killed(DECODES)),
    Fault("router_killed", 1.8, router_killed),
    Fault("p_frozen", 1.6, frozen(PREFILLS)),
    Fault("d_frozen", 1.6, frozen(DECODES)),
    Fault("peer_cut", 4, peer_cut),
    Fault("peer_stalled", 1.2, peer_stalled),
    Fault("session_cut", 3, session_cut),
    Fault("session_stalled", 1.2, session_stalled),
    Fault("drained", 1.0, drained),
)
