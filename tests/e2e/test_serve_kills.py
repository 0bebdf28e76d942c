"""kill -9 of every part of a Ray Serve cluster under load: two of each worker and two routers."""

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator, Sequence

import pytest

from tests.support.served import START_S, Served, ingress_of, statuses, until_idle, wait_for
from tests.support.streams import Answer, Json, Traffic, undisturbed, until, varied

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

CLIENTS = 16
FREED_S = 2.0
FLAGS = "--prefill 2 --decode 2 --router-replicas 2 --num-threads 1 --kv-memory 64MiB --port 0"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("s"), *FLAGS.split())
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.close()


@pytest.fixture(scope="module")
def url(served: Served) -> str:
    return served.wait_until_ready()


@pytest.fixture(scope="module")
def pool() -> list[Json]:
    return varied(16, tokens=(60, 140))


@pytest.fixture(scope="module")
def expected(url: str, pool: list[Json]) -> list[Answer]:
    return asyncio.run(undisturbed(url, pool))


async def until_over(answers: list[Answer]) -> None:
    """Wait until these have ended, well or not."""
    await until(lambda: all(answer.over for answer in answers), 120, "streams to end")


async def until_used(served: Served, deployment: str, first: set[int]) -> None:
    """Wait until a worker that is not among the first ones has had a part in a request."""
    async with asyncio.timeout(START_S):
        while True:
            for pid, status in (await statuses(served, deployment)).items():
                adopted = status.get("handoffs", {}).get("adopted")
                if pid not in first and (adopted or status.get("ended_transfers")):
                    return
            await asyncio.sleep(0.2)


async def test_killed_workers_and_a_killed_registry_end_no_stream(
    served: Served, url: str, pool: list[Json], expected: list[Answer]
) -> None:
    roles = ("PrefillWorker", "DecodeWorker")
    first = {process.pid for role in roles for process in served.replicas(role)}
    async with Traffic(url, pool, clients=CLIENTS) as traffic:
        for name in ("PrefillWorker", "DecodeWorker", "ray::Registry"):
            await until(lambda: len(traffic.running()) >= CLIENTS // 2, 60, "streams to run")
            victim = (await asyncio.to_thread(served.named, name))[0]
            hit = traffic.open()
            victim.kill()
            await until_over(hit)
        # Only through the restarted registry can the new workers be found.
        for role in roles:
            await until_used(served, role, first)
    assert traffic.wrong(expected) == []
    await until_idle(served)


def server_load(url: str) -> int:
    with urllib.request.urlopen(f"{url}/load", timeout=5) as answer:
        return int(json.loads(answer.read())["server_load"])


async def test_a_killed_router_ends_its_own_streams_alone(
    served: Served, url: str, pool: list[Json], expected: list[Answer]
) -> None:
    routers = {process: ingress_of(process) for process in served.replicas("Router")}
    assert len(routers) == 2
    victim, victim_url = next(iter(routers.items()))
    assert victim_url is not None
    streams = [place for place, body in enumerate(pool) if body["stream"]]
    others = [place for place, body in enumerate(pool) if not body["stream"]]

    def traffic(places: Sequence[int], clients: int) -> Traffic:
        return Traffic(url, [pool[place] for place in places], clients=clients)

    def wrong(found: Traffic, places: Sequence[int]) -> list[str]:
        return found.wrong([expected[place] for place in places])

    async with traffic(streams, CLIENTS) as long, traffic(others, 4) as silent:
        await until(lambda: len(long.running()) == CLIENTS, 60, "all streams to run")
        long.stop()
        own = await asyncio.to_thread(server_load, victim_url)
        victim.kill()
        killed_at = time.monotonic()
        async with traffic(range(len(pool)), 4) as new:
            await asyncio.sleep(killed_at + FREED_S - time.monotonic())
            ended = sum(t.ended() for t in (long, silent, new))
            held = await statuses(served, "DecodeWorker")
            begun = sum(len(t.answers) for t in (long, silent, new))
            assert sum(status["requests"] for status in held.values()) <= begun - ended
            await until(lambda: new.ended() >= CLIENTS, 120, "new requests")
    broken = [answer for _, answer in long.answers if answer.error]
    assert 0 < len(broken) <= own < CLIENTS + 4
    for answer in broken:
        assert answer.pieces
        assert not answer.done
        assert answer.over_at < killed_at + FREED_S
    long.answers = [(place, answer) for place, answer in long.answers if answer not in broken]
    assert wrong(long, streams) == []
    assert wrong(silent, others) == []  # not a byte had come: another router answered
    assert wrong(new, range(len(pool))) == []
    await until_idle(served)

    def healed() -> bool:
        return sum(ingress_of(process) is not None for process in served.replicas("Router")) == 2

    wait_for(healed, START_S, "the new router")
