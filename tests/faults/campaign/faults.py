"""The faults that leave all processes alive."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from kv_transfer.params import HANDOFF_SCOPE, decode_and_verify, sign
from tests.faults.campaign.client import Client, Json
from tests.faults.campaign.cluster import (
    DECODES,
    KEY,
    MAX_MODEL_LEN,
    PREFILLS,
    ROUTERS,
    WORKERS,
)
from tests.faults.campaign.run import Asked, Run
from tests.faults.campaign.traffic import Question

ASK = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass(frozen=True)
class Fault:
    """`work` starts the traffic itself, at its moment; `weight` is its share."""

    name: str
    weight: float
    work: Callable[[Run], Awaitable[None]]


# -- moments --------------------------------------------------------------------------------

READING = (("d_read", 0), ("d_read", 1), ("d_words", 0), ("d_verified", 0))
MOMENTS = (
    *(("p_compute", skip) for skip in (0, 1, 2)),
    ("d_claim", 0),
    *READING,
    *(("d_compute", skip) for skip in (0, 3)),
    ("", 0),  # any time
)
Strike = Callable[[str], Awaitable[None]]


async def at_moment(run: Run, moment: tuple[str, int], strike: Strike) -> None:
    """Start the traffic, stop the victim at the moment, strike, let it go on.

    `strike` gets the name of the worker where the victim stands (empty: at a random time).
    """
    point, skip = moment
    if not point:
        run.start()
        await asyncio.sleep(run.draws.uniform(0.0, 0.12))
        run.outcome.struck = not run.victim.over
        await strike("")
        return
    trap = await run.arm(point, run.victim, skip)
    run.start()
    at = await trap.hit(run.victim)
    run.outcome.struck = bool(at)
    try:
        if at:
            await strike(at)
    finally:
        await trap.open()


async def nothing(run: Run) -> None:
    run.start()
    run.outcome.struck = True


# -- clients --------------------------------------------------------------------------------


def leaving(window: str, moment: tuple[str, int]) -> Callable[[Run], Awaitable[None]]:
    """The victim's client leaves while the victim stands at the moment."""

    async def work(run: Run) -> None:
        run.victim.may = "left"
        left_at = 0.0
        # Nothing can be freed within a step, nor under a posted read.
        held = moment[0].endswith(("_compute", "_words"))

        async def leave(at: str) -> None:
            nonlocal left_at
            left_at = run.victim.client.leave(abruptly=run.draws.random() < 0.5)
            if held:
                return
            await run.released([run.victim], "client", window, left_at)

        await at_moment(run, moment, leave)
        if left_at and held:
            await run.released([run.victim], "client", window, time.monotonic())

    return work


async def leaves_queued(run: Run) -> None:
    """It leaves while the P's are busy with others."""
    run.victim.may = "left"
    await run.cluster.ask(PREFILLS, "slow", steps=4, step_s=0.08)
    for asked in run.asked[1:]:
        run.send(asked)
    await asyncio.sleep(0.03)
    run.send(run.victim)
    await asyncio.sleep(run.draws.uniform(0.005, 0.1))
    run.outcome.struck = not run.victim.over
    left_at = run.victim.client.leave(abruptly=run.draws.random() < 0.5)
    await run.released([run.victim], "client", "queued", left_at)


async def leaves_posted_read(run: Run) -> None:
    """It leaves while the network still has a read of it; blocks are held until that is over."""
    late_s = run.draws.uniform(0.1, 0.6)
    posted = asyncio.Event()
    posted_at = 0.0

    def heard(name: str, kind: str, value: Any) -> None:
        nonlocal posted_at
        if kind == "reading" and not posted.is_set():
            posted_at = time.monotonic()
            posted.set()

    run.victim.may = "left"
    run.asked[1:] = []
    run.cluster.listeners.append(heard)
    try:
        await run.cluster.ask(DECODES, "change_reads", kind="kv", count=1, late_s=late_s)
        run.start()
        assert run.victim.task is not None
        waiting = asyncio.create_task(posted.wait())
        await asyncio.wait({waiting, run.victim.task}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
    finally:
        run.cluster.listeners.remove(heard)
    run.outcome.struck = posted.is_set()
    left_at = run.victim.client.leave(abruptly=True)
    await run.released([run.victim], "client", "posted read", max(left_at, posted_at + late_s))


def _slow_reader(run: Run) -> Asked:
    question = run.draws.choice([q for q in run.pool if q.kind == "talkative"])
    run.asked[0] = run.make(question, run.victim.client.label, stream=True, slow=True)
    return run.victim


async def leaves_writing(run: Run) -> None:
    """It has stopped reading when it leaves."""
    victim = _slow_reader(run)
    victim.may = "left"
    run.start()
    await asyncio.wait(
        {asyncio.create_task(victim.client.tokens_seen.wait()), asyncio.create_task(_over(victim))},
        return_when=asyncio.FIRST_COMPLETED,
    )
    victim.client.stop_reading()
    await asyncio.sleep(run.draws.uniform(0.02, 0.4))
    run.outcome.struck = not victim.over
    left_at = victim.client.leave(abruptly=run.draws.random() < 0.5)
    await run.released([victim], "client", "writing", left_at)


async def reads_slowly(run: Run) -> None:
    """It stops reading for a while, then gets everything."""
    victim = _slow_reader(run)
    run.start()
    await asyncio.sleep(run.draws.uniform(0.01, 0.1))
    victim.client.stop_reading()
    await asyncio.sleep(run.draws.uniform(0.1, 0.5))
    run.outcome.struck = not victim.over
    victim.client.go_on_reading()


async def _over(asked: Asked) -> None:
    assert asked.task is not None
    await asyncio.wait({asked.task})


# -- memory, time and reads -----------------------------------------------------------------


async def blocks_reused(run: Run) -> None:
    """P gives the victim's blocks to others, who overwrite them, and tells D nothing."""

    async def strike(at: str) -> None:
        for name in await run.holders(run.victim, PREFILLS):
            await run.cluster[name].call("expire", prefix=run.victim.prefix, mute=True)
            await _no_lease(run, name)
            await run.cluster[name].call("reuse")

    await at_moment(run, run.draws.choice(READING), strike)


async def _no_lease(run: Run, name: str) -> None:
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        found = await run.cluster[name].call("holds", prefix=run.victim.prefix)
        if not found:
            return
        await asyncio.sleep(0.01)
    run.outcome.struck = False  # it was still in its prefill: nothing expires then


async def lease_over(run: Run) -> None:
    """P's lease ends early, and D is told."""

    async def strike(at: str) -> None:
        await run.cluster.ask(PREFILLS, "expire", prefix=run.victim.prefix)
        await asyncio.sleep(run.draws.uniform(0.0, 0.25))
        if run.draws.random() < 0.5:
            await run.cluster.ask(PREFILLS, "reuse")

    await at_moment(run, run.draws.choice((("d_claim", 0), *READING)), strike)


async def read_fails(run: Run) -> None:
    kind = run.draws.choice(("kv", "words", ""))
    count = run.draws.randint(1, 3)
    await run.cluster.ask(DECODES, "change_reads", kind=kind, count=count, late_s=0.0)
    run.start()
    run.outcome.struck = True


async def read_late(run: Run) -> None:
    """The network holds a read, some longer than D waits: then it lands in quarantine."""
    late_s = run.draws.choice((0.02, 0.2, 0.6, 1.3, 1.8))
    kind = run.draws.choice(("kv", "kv", "words"))
    count = run.draws.randint(1, 3)
    await run.cluster.ask(DECODES, "change_reads", kind=kind, count=count, late_s=late_s)
    run.start()
    run.outcome.struck = True


async def slow_steps(run: Run) -> None:
    name = run.draws.choice(WORKERS)
    steps, step_s = run.draws.randint(3, 12), run.draws.uniform(0.01, 0.08)
    await run.cluster.ask([name], "slow", steps=steps, step_s=step_s)
    run.start()
    run.outcome.struck = True


def full(names: tuple[str, ...]) -> Callable[[Run], Awaitable[None]]:
    """All memory of these workers is taken for a while."""

    async def work(run: Run) -> None:
        async def strike(at: str) -> None:
            await run.cluster.ask(names, "exhaust", leave=run.draws.choice((0, 2, 12)))

        if run.draws.random() < 0.5:
            await strike("")
            run.start()
        else:
            run.start()
            await asyncio.sleep(run.draws.uniform(0.0, 0.06))
            await strike("")
        run.outcome.struck = True
        await asyncio.sleep(run.draws.uniform(0.05, 0.6))
        await run.cluster.ask(names, "clear")

    return work


# -- what clients send ----------------------------------------------------------------------


async def too_long(run: Run) -> None:
    """A prompt that no worker can hold is refused at once."""
    run.start()
    prompt = [500] * run.draws.randint(MAX_MODEL_LEN, 4000)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4}
    await refused(run, "/v1/completions", body, "too long")
    run.outcome.struck = True


async def refused(run: Run, path: str, body: Json, what: str) -> None:
    """Send what must get a 4xx with a message."""
    label = f"{run.index}.refused"
    reply = await Client(run.cluster[run.draws.choice(ROUTERS)].port, path, body, label).run()
    if not (400 <= reply.status < 500 and reply.complete):
        run.fail(f"{what}: HTTP {reply.status} {reply.problem} {reply.body[:300]!r}")
        return
    run.outcome.results[f"refused {what}"] += 1
    if not reply.json["error"]["message"]:
        run.fail(f"{what}: refused without a word")


def params(what: str) -> Callable[[Run], Awaitable[None]]:
    """The two-step form's params come back edited, used, expired or from another cluster."""

    async def work(run: Run) -> None:
        run.start()
        await run.finish()
        asked = run.make(run.draws.choice(_two_step(run)), stream=False)
        first = {**asked.client.body, "max_tokens": 1, "kv_transfer_params": ASK}
        for name in ("min_tokens", "stream", "stream_options"):
            first.pop(name, None)
        router = run.cluster[asked.router]
        path = asked.question.path
        reply = await Client(router.port, path, first, f"{run.index}.first").run()
        if reply.status != 200:
            run.fail(f"step 1: HTTP {reply.status} {reply.body[:300]!r}")
            return
        given: Json = reply.json["kv_transfer_params"]
        if what in ("used", "good"):
            asked.client.body["kv_transfer_params"] = given
            run.asked.append(asked)
            run.send(asked)
            await run.finish()
        elif what == "expired":
            await run.cluster.ask(PREFILLS, "expire")
            await asyncio.sleep(0.15)
        sent = _changed(run, given, what)
        run.outcome.struck = True
        if what == "good":
            return
        before = await _bytes_read(run)
        second = {**asked.client.body, "kv_transfer_params": sent}
        await refused(run, path, second, f"params {what}")
        after = await _bytes_read(run)
        if after != before:
            run.fail(f"params {what}: {after - before} bytes were read")

    return work


def _two_step(run: Run) -> list[Question]:
    """What leaves room for a second token: else P's own ends the transfer at once."""
    return [
        question
        for question in run.pool
        if question.two_step
        and question.body["max_tokens"] > 1
        and run.expected[question.number]["usage"]["prompt_tokens"] < MAX_MODEL_LEN - 4
    ]


def _changed(run: Run, given: Json, what: str) -> Json:
    if what == "edited":
        edits: list[tuple[str, object]] = [
            ("transfer_id", given["transfer_id"][::-1]),
            ("remote_num_tokens", given["remote_num_tokens"] + 8),
            ("remote_port", given["remote_port"] + 1),
            ("remote_block_ids", [*given["remote_block_ids"], 0]),
            ("prompt_digest", given["prompt_digest"][::-1]),
            ("lease_ms", 10_000_000),
        ]
        return dict([*given.items(), run.draws.choice(edits)])
    if what == "foreign":
        ours = decode_and_verify(json.dumps(given), KEY, HANDOFF_SCOPE)
        theirs: Json = json.loads(sign(ours, "another cluster's key", HANDOFF_SCOPE).encode())
        return theirs
    return given


async def _bytes_read(run: Run) -> int:
    states = await run.cluster.ask(DECODES, "status")
    return sum(state["handoffs"]["num_bytes"] for state in states.values())


LIGHT = (
    Fault("nothing", 3, nothing),
    Fault("leaves_queued", 4, leaves_queued),
    Fault("leaves_prefilling", 4, leaving("prefilling", ("p_compute", 0))),
    Fault("leaves_prefilling_late", 3, leaving("prefilling", ("p_compute", 1))),
    Fault("leaves_before_claim", 4, leaving("before the claim", ("d_claim", 0))),
    Fault("leaves_reading", 4, leaving("reading", ("d_read", 0))),
    Fault("leaves_verifying", 4, leaving("verifying", ("d_words", 0))),
    Fault("leaves_posted_read", 4, leaves_posted_read),
    Fault("leaves_decoding", 5, leaving("decoding", ("d_compute", 2))),
    Fault("leaves_writing", 4, leaves_writing),
    Fault("reads_slowly", 2, reads_slowly),
    Fault("blocks_reused", 10, blocks_reused),
    Fault("lease_over", 6, lease_over),
    Fault("read_fails", 6, read_fails),
    Fault("read_late", 5, read_late),
    Fault("slow_steps", 3, slow_steps),
    Fault("d_full", 4, full(DECODES)),
    Fault("p_full", 4, full(PREFILLS)),
    Fault("too_long", 2, too_long),
    Fault("params_good", 2, params("good")),
    Fault("params_edited", 2, params("edited")),
    Fault("params_used", 2, params("used")),
    Fault("params_expired", 2, params("expired")),
    Fault("params_foreign", 1, params("foreign")),
)
