"""What may follow a failed attempt, fault by fault; the clock is ours."""

from pathlib import Path
from typing import Any

import pytest

from contracts.errors import (
    ConfigurationError,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    ServingError,
    TransferGone,
    Unavailable,
)
from contracts.ids import Incarnation, WorkerId
from router.attempt import WorkerFault
from router.config import RouterConfig
from router.placement import Instance
from router.retries import FaultKind, Retries, kind_of

D1: Instance = (WorkerId("d1"), Incarnation(1))


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


def config(tmp_path: Path, **settings: Any) -> RouterConfig:
    return RouterConfig(
        model_path=str(tmp_path), served_model_name="m", cluster_key="k", **settings
    )


def fault(error: ServingError, *, lost: bool = False, drained: bool = False) -> WorkerFault:
    return WorkerFault(WorkerId("d1"), error, lost=lost, drained=drained)


LOST = fault(Unavailable("lost"), lost=True)
DRAINED = fault(Unavailable("lost"), lost=True, drained=True)
MOVED = fault(Unavailable("draining"))
FULL = fault(Overloaded("full"))
FAILED = fault(EngineFailure("failed"))


@pytest.mark.parametrize(
    ("one", "kind"),
    [
        (LOST, FaultKind.LOST),
        (DRAINED, FaultKind.MOVED),
        (MOVED, FaultKind.MOVED),
        (FULL, FaultKind.FULL),
        (FAILED, FaultKind.FAILED),
        (fault(TransferGone("gone")), FaultKind.FAILED),
    ],
    ids=["lost", "drained", "draining", "full", "failed", "handoff"],
)
def test_kinds(one: WorkerFault, kind: FaultKind) -> None:
    assert kind_of(one) is kind


@pytest.mark.parametrize(
    ("one", "emitted", "allowed"),
    [
        (LOST, 0, 8),
        (LOST, 5, 8),
        (FAILED, 0, 2),
        (FAILED, 5, 3),
        (MOVED, 0, None),
        (MOVED, 5, None),
        (DRAINED, 5, None),
        (FULL, 0, None),
        (fault(InvalidRequest("bad")), 0, 0),
        (fault(InvalidRequest("bad")), 5, 0),
    ],
)
def test_how_many_are_allowed(
    tmp_path: Path, one: WorkerFault, emitted: int, allowed: int | None
) -> None:
    retries = Retries(config(tmp_path), Clock())
    for _ in range(1000 if allowed is None else allowed):
        retries.add(one, D1, emitted)
    if allowed is not None:
        with pytest.raises(type(one.error)):
            retries.add(one, D1, emitted)


def test_lost_workers_count_over_the_whole_answer(tmp_path: Path) -> None:
    """A request that kills its worker with each token makes headway, and must end all the same."""
    retries = Retries(config(tmp_path, max_lost_workers=3), Clock())
    for emitted in range(3):
        retries.add(LOST, None, emitted)
    with pytest.raises(Unavailable):
        retries.add(LOST, None, 100)


@pytest.mark.parametrize(
    ("one", "emitted", "at_once", "later"),
    [
        (FULL, 0, True, True),
        (FULL, 5, True, False),
        (MOVED, 0, True, False),
        (MOVED, 5, True, False),
        (FAILED, 0, True, True),
        (FAILED, 5, True, True),
        (LOST, 5, False, False),
        (fault(TransferGone("gone")), 0, False, False),
    ],
)
def test_who_is_asked_again(
    tmp_path: Path, one: WorkerFault, emitted: int, at_once: bool, later: bool
) -> None:
    clock = Clock()
    retries = Retries(config(tmp_path), clock)
    retries.add(one, D1, emitted)
    assert (D1 in retries.excluded) is at_once
    clock.now += 0.3
    assert (D1 in retries.excluded) is later


def test_waiting_is_bounded_since_the_last_token(tmp_path: Path) -> None:
    retries = Retries(config(tmp_path, worker_wait_s=5, replay_wait_s=60), Clock())
    assert retries.wait_s(0) == 5
    retries.waited(4)
    assert retries.wait_s(0) == 1
    retries.waited(2)
    assert retries.wait_s(0) == 0
    assert retries.wait_s(3) == 60
    retries.waited(59)
    assert retries.wait_s(3) == 1
    assert retries.wait_s(4) == 60
    retries.add(FULL, D1, 4)
    assert retries.wait_s(4) == 0.25  # then D1 is asked again
    retries.waited(59.9)
    assert retries.wait_s(4) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_lost_workers", -1),
        ("worker_wait_s", -1),
        ("replay_wait_s", -1),
        ("queue_wait_s", -1),
        ("request_timeout_s", 0),
        ("body_timeout_s", 0),
        ("write_timeout_s", 0),
    ],
)
def test_limits_that_make_no_sense(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=name):
        config(tmp_path, **{name: value})
