"""`baton status`: how workers are, and whether their ledgers add up."""

import asyncio
import json
from collections.abc import Mapping, Sequence

from contracts.errors import ServingError
from rpc.status import fetch_status

STATES = ("free", "cached", "owned", "leased", "reserved", "quarantined")


def ledger_error(status: Mapping[str, object]) -> str | None:
    """Why the block ledger in a worker's status is wrong; None if every block is counted once."""
    ledger = status.get("ledger")
    if not isinstance(ledger, Mapping):
        return "the worker shows no ledger"
    counts = {state: ledger.get(state) for state in (*STATES, "total")}
    wrong = [state for state, count in counts.items() if not isinstance(count, int) or count < 0]
    if wrong:
        return f"no count of {wrong[0]} blocks"
    numbers = {state: int(str(count)) for state, count in counts.items()}
    total = numbers.pop("total")
    if sum(numbers.values()) == total:
        return None
    terms = " + ".join(f"{count} {state}" for state, count in numbers.items())
    return f"{terms} = {sum(numbers.values())}, not {total}"


def show_status(addresses: Sequence[str], *, cluster_key: str, check: bool, as_json: bool) -> int:
    """Print each worker's status. Returns 1 if one does not answer or, with `check`, adds up."""
    answers = asyncio.run(_ask_all(addresses, cluster_key))
    bad = False
    for address, answer in zip(addresses, answers, strict=True):
        if isinstance(answer, BaseException):
            bad = True
            print(f"{address}: {answer}")
            continue
        error = ledger_error(answer)
        bad = bad or (check and error is not None)
        print(json.dumps({"address": address, **answer}) if as_json else _lines(address, answer))
        if error is not None and not as_json:
            print(f"  ledger WRONG: {error}")
    return 1 if bad else 0


async def _ask_all(
    addresses: Sequence[str], cluster_key: str
) -> list[dict[str, object] | ServingError]:
    async def ask(address: str) -> dict[str, object] | ServingError:
        try:
            return await fetch_status(address, cluster_key=cluster_key)
        except ServingError as error:
            return error

    return list(await asyncio.gather(*(ask(address) for address in addresses)))


def _lines(address: str, status: Mapping[str, object]) -> str:
    lines = [f"{address}: {status.get('role', '?')} worker {status.get('worker_id', '?')}"]
    for key, value in status.items():
        if key in ("role", "worker_id"):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        lines.append(f"  {key}: {value}")
    return "\n".join(lines)
