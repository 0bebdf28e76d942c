"""Random kills on a whole Ray Serve cluster under random traffic, every answer checked.

    python -m tests.faults.serve_campaign --runs 20 --seed 1 [--only RUN]

One cluster of two prefill workers, two decode workers and two routers lives through all runs. Each
run draws its traffic, its victims and the moment from (seed, run), so `--only` repeats one. After
each: no stream has ended in an error but those of a killed router, every text is that of an
undisturbed cluster, the cluster has healed, and no worker holds a block. Exit code 1 otherwise.
"""

import argparse
import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.served import START_S, Served, ingress_of, until_idle
from tests.support.streams import Answer, Json, Traffic, undisturbed, until, varied

FLAGS = "--prefill 2 --decode 2 --router-replicas 2 --num-threads 1 --kv-memory 64MiB --port 0"
FLAGS += " --end-with-parent"
POOL = 24
ENDED_S = 120.0
FREED_S = 2.0

_PREFILL, _DECODE, _ROUTER = "PrefillWorker", "DecodeWorker", "Router"
_REGISTRY, _CONTROLLER, _REDEPLOY = "ray::Registry", "ray::ServeController", "redeploy"
FAULTS: tuple[tuple[str, ...], ...] = (
    (_PREFILL,),
    (_DECODE,),
    (_REGISTRY,),
    (_ROUTER,),
    (_CONTROLLER,),
    (_PREFILL, _DECODE),
    (_DECODE, _REGISTRY),
    (_PREFILL, _PREFILL),  # all of them: decode workers go on alone
    (_DECODE, _CONTROLLER),
    (_REDEPLOY,),
)


@dataclass(frozen=True)
class Result:
    """One run. `broken` streams were those of a killed router; `wrong` ones are faults of ours."""

    run: int
    fault: str
    requests: int
    broken: int
    wrong: tuple[str, ...]
    healed_s: float


class Campaign:
    """The cluster, and what it answers when nothing is wrong with it."""

    def __init__(self, served: Served, seed: int) -> None:
        self._served = served
        self._seed = seed
        self._url = served.wait_until_ready()
        self._pool = varied(POOL, tokens=(20, 160), seed=seed)
        self._expected = asyncio.run(undisturbed(self._url, self._pool))

    async def run(self, number: int) -> Result:
        """One fault under traffic.

        Raises:
            AssertionError: a request hangs, or the cluster does not heal.
        """
        draw = random.Random(f"{self._seed}/{number}")
        fault = draw.choice(FAULTS)
        clients = draw.randint(4, 16)
        seed = draw.randrange(1 << 30)
        async with Traffic(self._url, self._pool, clients=clients, seed=seed) as traffic:
            await until(lambda: len(traffic.running()) > clients // 2, ENDED_S, "streams to run")
            await asyncio.sleep(draw.uniform(0, 2))
            if fault == (_REDEPLOY,):
                await self._redeploy()
                killed_at = -1.0
            else:
                gone = await self._kill(fault, draw)
                killed_at = time.monotonic()
            hit = traffic.open()
            await until(lambda: all(answer.over for answer in hit), ENDED_S, "streams to end")
        began = time.monotonic()
        if killed_at > 0:
            await self._healed(gone)
        await until_idle(self._served)
        broken, wrong = self._judge(traffic, hit if _ROUTER in fault else [], killed_at)
        healed_s = time.monotonic() - (began if killed_at < 0 else killed_at)
        name = " + ".join(part.removeprefix("ray::") for part in fault)
        return Result(number, name, len(traffic.answers), broken, tuple(wrong), healed_s)

    async def _kill(self, fault: Sequence[str], draw: random.Random) -> dict[str, set[int]]:
        """kill -9 of one process of each name; they are chosen among the living each time."""
        victims: list[tuple[str, psutil.Process]] = []
        for name in fault:
            taken = [process for _, process in victims]
            living = [p for p in await self._living(name) if p not in taken]
            victims.append((name, draw.choice(sorted(living, key=lambda p: int(p.pid)))))
        gone: dict[str, set[int]] = {}
        for name, victim in victims:
            victim.kill()
            gone.setdefault(name, set()).add(victim.pid)
        return gone

    async def _living(self, name: str) -> list[psutil.Process]:
        find = self._served.named if name.startswith("ray::") else self._served.replicas
        return await asyncio.to_thread(find, name)

    async def _redeploy(self) -> None:
        process = await asyncio.to_thread(self._served.redeploy)
        code = await asyncio.to_thread(process.wait, 2 * START_S)
        assert code == 0, "the new deployment failed"

    async def _healed(self, gone: dict[str, set[int]]) -> None:
        """Wait until each killed process has a successor; workers are seen to by `until_idle`."""
        async with asyncio.timeout(START_S):
            for name, pids in gone.items():
                wanted = 1 if name.startswith("ray::") else 2
                while True:
                    living = [p for p in await self._living(name) if p.pid not in pids]
                    if name == _ROUTER:
                        living = [p for p in living if await asyncio.to_thread(ingress_of, p)]
                    if len(living) == wanted:
                        break
                    await asyncio.sleep(0.2)

    def _judge(
        self, traffic: Traffic, excused: list[Answer], killed_at: float
    ) -> tuple[int, list[str]]:
        """How many streams a killed router broke as it may, and what is wrong with the rest."""
        wrong: list[str] = []
        broken = 0
        for place, answer in traffic.answers:
            how = answer.differs(self._expected[place])
            if not how:
                continue
            cut = answer in excused and answer.pieces and not answer.done
            if cut and answer.over_at < killed_at + FREED_S:
                broken += 1
            else:
                wrong.append(f"{how}: {self._describe(place)}")
        return broken, wrong

    def _describe(self, place: int) -> Json:
        return {k: v for k, v in self._pool[place].items() if k not in ("messages", "tools")}


def main() -> int:
    """Run the campaign; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this run alone")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="baton-campaign-"))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # by way of `finally`
    served = Served(folder, *FLAGS.split())
    results: list[Result] = []
    failed = ""
    try:
        campaign = Campaign(served, args.seed)
        for number in [args.only] if args.only is not None else range(args.runs):
            result = asyncio.run(campaign.run(number))
            results.append(result)
            print(
                f"run {result.run}: {result.fault}: {result.requests} requests,"
                f" {result.broken} cut with their router, {len(result.wrong)} wrong,"
                f" healed after {result.healed_s:.1f} s",
                flush=True,
            )
            for how in result.wrong:
                print(f"  {how}", flush=True)
    except (AssertionError, OSError, psutil.Error) as error:  # TimeoutError is an OSError
        failed = f"run {len(results)} (seed {args.seed}): {error or type(error).__name__}"
    finally:
        served.close()
        shutil.rmtree(folder, ignore_errors=True)
    faults = Counter(result.fault for result in results)
    wrong = sum(len(result.wrong) for result in results)
    print(f"seed {args.seed}: {len(results)} runs, {wrong} wrong answers; {dict(faults)}")
    if failed:
        print(f"FAILED: {failed}")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
