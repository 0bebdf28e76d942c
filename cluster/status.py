"""`baton status`: how workers are, and whether each of their blocks is accounted for."""

import asyncio
import json
from collections.abc import Mapping, Sequence

from contracts.errors import ServingError
from rpc.status import fetch_status

_TIMEOUT_S = 5.0
_AUDIT_TIMEOUT_S = 30.0  # it waits for the end of a step, several times
HOST_STATES = ("free", "cached", "loading")
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
        return _offload_error(status)
    terms = " + ".join(f"{count} {state}" for state, count in numbers.items())
    return f"{terms} = {sum(numbers.values())}, not {total}"


def _offload_error(status: Mapping[str, object]) -> str | None:
    """Why the ledger of host memory is wrong; None without one."""
    kept = status.get("offload")
    if kept is None:
        return None
    if not isinstance(kept, Mapping):
        return "the ledger of host memory is not readable"
    counts = [kept.get(state) for state in (*HOST_STATES, "total")]
    numbers = [count for count in counts if isinstance(count, int) and count >= 0]
    if len(numbers) == len(counts) and sum(numbers[:-1]) == numbers[-1]:
        return None
    terms = ", ".join(f"{state} {count}" for state, count in kept.items())
    return f"the blocks of host memory do not add up: {terms}"


def findings_of(status: Mapping[str, object]) -> list[str]:
    """What is wrong with a worker's blocks; its audit's findings only if it was asked for them."""
    error = ledger_error(status)
    found = status.get("findings", [])
    if not isinstance(found, Sequence):
        return ["the worker's audit is not readable"]
    return [error, *map(str, found)] if error else [*map(str, found)]


def show_status(addresses: Sequence[str], *, cluster_key: str, check: bool, as_json: bool) -> int:
    """Print each worker's status; with `check`, have each audit its blocks.

    Returns 1 if one does not answer, or with `check` if something is wrong.
    """
    answers = asyncio.run(_ask_all(addresses, cluster_key, check))
    bad = False
    for address, answer in zip(addresses, answers, strict=True):
        if isinstance(answer, BaseException):
            bad = True
            print(f"{address}: {answer}")
            continue
        found = findings_of(answer)
        if check and "findings" not in answer:
            found.append("the worker did not audit its blocks")
        bad = bad or (check and bool(found))
        if as_json:
            print(json.dumps({"address": address, **answer}))
            continue
        print(_lines(address, answer))
        for finding in found:
            print(f"  WRONG: {finding}")
        if check and not found:
            print("  audit: every block is accounted for")
    return 1 if bad else 0


async def _ask_all(
    addresses: Sequence[str], cluster_key: str, audit: bool
) -> list[dict[str, object] | ServingError]:
    async def ask(address: str) -> dict[str, object] | ServingError:
        try:
            limit_s = _AUDIT_TIMEOUT_S if audit else _TIMEOUT_S
            return await fetch_status(
                address, cluster_key=cluster_key, timeout_s=limit_s, audit=audit
            )
        except ServingError as error:
            return error

    return list(await asyncio.gather(*(ask(address) for address in addresses)))


def _lines(address: str, status: Mapping[str, object]) -> str:
    lines = [f"{address}: {status.get('role', '?')} worker {status.get('worker_id', '?')}"]
    for key, value in status.items():
        if key in ("role", "worker_id", "findings"):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        lines.append(f"  {key}: {value}")
    return "\n".join(lines)
