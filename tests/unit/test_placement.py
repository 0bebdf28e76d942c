from dataclasses import replace

import pytest

from contracts.errors import InvalidRequest, Unavailable
from contracts.events import WorkerLoad
from contracts.ids import Incarnation, WorkerId
from contracts.worker import Role
from router.placement import (
    Decision,
    DecodesFull,
    Need,
    NoCapacity,
    Path,
    Reason,
    WorkerSnapshot,
    choose,
    choose_decode,
)


def worker(
    name: str,
    *,
    running: int = 0,
    waiting: int = 0,
    waiting_tokens: int = 0,
    free_blocks: int = 0,
    draining: bool = False,
    fits: int = 1000,
    model: str = "m",
    unreported: int = 0,
    unreported_tokens: int = 0,
) -> WorkerSnapshot:
    """A worker; the name's first letter is its role."""
    return WorkerSnapshot(
        worker_id=WorkerId(name),
        role=Role.PREFILL if name[0] == "p" else Role.DECODE,
        semantic_hash=model,
        max_prompt_tokens=fits,
        load=WorkerLoad(
            running=running,
            waiting=waiting,
            waiting_tokens=waiting_tokens,
            free_blocks=free_blocks,
            draining=draining,
        ),
        unreported=unreported,
        unreported_tokens=unreported_tokens,
    )


def brief(decision: Decision) -> tuple[Path, Reason, str | None, str | None]:
    return decision.path, decision.reason, decision.prefill, decision.decode


NEED = Need(prompt_tokens=100, max_tokens=10)
REMOTE, LOCAL, ONLY = Path.REMOTE, Path.LOCAL, Path.PREFILL_ONLY


@pytest.mark.parametrize(
    ("workers", "need", "expected"),
    [
        pytest.param(
            [worker("p1"), worker("d1")],
            NEED,
            (REMOTE, Reason.DISAGGREGATED, "p1", "d1"),
            id="one-pair",
        ),
        pytest.param(
            [worker("p2"), worker("d2"), worker("p1"), worker("d1")],
            NEED,
            (REMOTE, Reason.DISAGGREGATED, "p1", "d1"),
            id="ties-go-to-the-lower-id",
        ),
        pytest.param(
            [
                worker("p1", waiting_tokens=9),
                worker("p2", waiting=3, waiting_tokens=8),
                worker("d1", running=3),
                worker("d2", running=1, waiting=1),
            ],
            NEED,
            (REMOTE, Reason.DISAGGREGATED, "p2", "d2"),
            id="least-loaded",
        ),
        pytest.param(
            [
                worker("p1", unreported=1, unreported_tokens=50),
                worker("p2", waiting_tokens=49),
                worker("d1", unreported=2),
                worker("d2", running=1),
            ],
            NEED,
            (REMOTE, Reason.DISAGGREGATED, "p2", "d2"),
            id="counts-what-is-not-reported-yet",
        ),
        pytest.param(
            [worker("p1"), worker("d1", free_blocks=1), worker("d2", free_blocks=2)],
            NEED,
            (REMOTE, Reason.DISAGGREGATED, "p1", "d2"),
            id="equal-decodes-by-free-blocks",
        ),
        pytest.param(
            [
                worker("p1", draining=True),
                worker("p2", running=9),
                worker("d1", draining=True),
                worker("d2", running=9),
            ],
            NEED,
            (REMOTE, Reason.DISAGGREGATED, "p2", "d2"),
            id="not-draining",
        ),
        pytest.param(
            [worker("p1", fits=99), worker("p2", running=9), worker("d1", fits=99), worker("d2")],
            NEED,
            (REMOTE, Reason.DISAGGREGATED, "p2", "d2"),
            id="must-fit",
        ),
        pytest.param(
            [
                worker("p1", model="old"),
                worker("p2", model="new", running=9),
                worker("d1", model="new"),
            ],
            NEED,
            (REMOTE, Reason.DISAGGREGATED, "p2", "d1"),
            id="never-mixes-models",
        ),
        pytest.param(
            [worker("p1", model="old"), worker("d1", model="new")],
            NEED,
            (LOCAL, Reason.NO_PREFILL_WORKER, None, "d1"),
            id="no-equal-prefill",
        ),
        pytest.param(
            [worker("d1")], NEED, (LOCAL, Reason.NO_PREFILL_WORKER, None, "d1"), id="no-prefill"
        ),
        pytest.param(
            [worker("p1", fits=99), worker("d1")],
            NEED,
            (LOCAL, Reason.PROMPT_EXCEEDS_PREFILL, None, "d1"),
            id="fits-no-prefill",
        ),
        pytest.param(
            [worker("p1"), worker("d1")],
            Need(prompt_tokens=100, max_tokens=1),
            (ONLY, Reason.ONE_TOKEN, "p1", None),
            id="one-token-needs-no-decode",
        ),
        pytest.param(
            [worker("p1")],
            Need(prompt_tokens=100, max_tokens=1),
            (ONLY, Reason.ONE_TOKEN, "p1", None),
            id="one-token-without-any-decode",
        ),
        pytest.param(
            [worker("p1"), worker("d1")],
            Need(prompt_tokens=100, max_tokens=10, force_local=True),
            (LOCAL, Reason.HANDOFF_REFUSED, None, "d1"),
            id="handoff-refused",
        ),
        pytest.param(
            [worker("p1"), worker("d1"), worker("d2", model="other")],
            Need(prompt_tokens=100, max_tokens=10, emitted_tokens=3, semantic_hash="m"),
            (LOCAL, Reason.REPLAY, None, "d1"),
            id="replay-is-local-and-same-model",
        ),
        pytest.param(
            [worker("p1"), worker("p2", running=9), worker("d1")],
            Need(prompt_tokens=100, max_tokens=10, exclude=frozenset({worker("p1").instance})),
            (REMOTE, Reason.DISAGGREGATED, "p2", "d1"),
            id="excluded",
        ),
    ],
)
def test_choose(
    workers: list[WorkerSnapshot],
    need: Need,
    expected: tuple[Path, Reason, str | None, str | None],
) -> None:
    assert brief(choose(workers, need)) == expected
    assert brief(choose(reversed(workers), need)) == expected


def test_aggregated_never_uses_a_prefill_worker() -> None:
    workers = [worker("p1"), worker("d1")]
    for max_tokens in (1, 10):
        need = Need(prompt_tokens=100, max_tokens=max_tokens)
        decision = choose(workers, need, aggregated=True)
        assert brief(decision) == (LOCAL, Reason.AGGREGATED, None, "d1")


@pytest.mark.parametrize(
    ("workers", "error"),
    [
        pytest.param([], Unavailable, id="nobody"),
        pytest.param([worker("p1")], Unavailable, id="no-decode"),
        pytest.param([worker("p1"), worker("d1", draining=True)], Unavailable, id="draining"),
        pytest.param(
            [worker("d1", fits=99), worker("d2", draining=True)], Unavailable, id="fits-a-draining"
        ),
        pytest.param([worker("p1"), worker("d1", fits=99)], InvalidRequest, id="fits-no-decode"),
    ],
)
def test_choose_refuses(workers: list[WorkerSnapshot], error: type[Exception]) -> None:
    with pytest.raises(error):
        choose(workers, NEED)


def test_too_long_prompt_names_both_numbers() -> None:
    with pytest.raises(InvalidRequest, match=r"100 tokens.*99") as caught:
        choose([worker("d1", fits=99)], NEED)
    assert caught.value.param == "input_tokens"


def test_choose_decode_asks_each_worker_once() -> None:
    workers = [worker("d1"), worker("d2", running=1), worker("d3", model="other"), worker("p1")]
    need = Need(
        prompt_tokens=1, max_tokens=2, semantic_hash="m", exclude=frozenset({workers[0].instance})
    )
    assert choose_decode(workers, need) == "d2"
    none = Need(
        prompt_tokens=1,
        max_tokens=2,
        semantic_hash="m",
        exclude=frozenset({workers[0].instance, workers[1].instance}),
    )
    with pytest.raises(NoCapacity):
        choose_decode(workers, none)


# Room on a D, before a P computes


def test_a_handoff_goes_where_its_blocks_can_be_promised() -> None:
    need = Need(prompt_tokens=100, max_tokens=10, num_choices=3)
    assert need.blocks(16) == 7 + 2

    def d(name: str, promised: int, *, refuses: bool = False) -> WorkerSnapshot:
        return replace(
            worker(name),
            block_size=16,
            total_blocks=20,
            promised_blocks=promised,
            refuses=refuses,
        )

    assert brief(choose([worker("p1"), d("d1", 12), d("d2", 11)], need))[3] == "d2"
    assert brief(choose([worker("p1"), d("d1", 0, refuses=True), d("d2", 11)], need))[3] == "d2"
    with pytest.raises(DecodesFull):
        choose([worker("p1"), d("d1", 12), d("d2", 0, refuses=True)], need)
    full = [worker("p1"), d("d1", 12)]
    assert brief(choose(full, replace(need, force_local=True)))[0] is LOCAL
    assert brief(choose(full[1:], need))[0] is LOCAL  # it queues there, as it must
    assert brief(choose(full, replace(need, max_tokens=1)))[0] is ONLY
    assert brief(choose(full, need, aggregated=True))[0] is LOCAL
    with pytest.raises(InvalidRequest, match="room for a prompt of that length and 15 choices"):
        choose([worker("p1"), d("d1", 0)], replace(need, num_choices=15))


def test_room_is_asked_of_workers_of_the_same_model_as_the_prefill_worker() -> None:
    d1 = replace(worker("d1", model="new"), refuses=True)
    workers = [worker("p1", model="new"), d1, worker("d2", model="old")]
    with pytest.raises(DecodesFull):
        choose(workers, NEED)


def test_a_replay_may_go_on_to_the_very_end_of_the_context() -> None:
    d = replace(worker("d1", fits=99), max_model_len=113)
    need = replace(NEED, emitted_tokens=12, semantic_hash="m")
    assert brief(choose([d], need)) == (LOCAL, Reason.REPLAY, None, "d1")
    with pytest.raises(NoCapacity):  # never the client's fault in the middle of its answer
        choose([d], replace(need, emitted_tokens=13))


def test_another_start_of_an_excluded_worker_is_not_excluded() -> None:
    old = worker("d1")
    new = replace(old, incarnation=Incarnation(7))
    need = replace(NEED, exclude=frozenset({old.instance}))
    assert brief(choose([new], need))[3] == "d1"
    with pytest.raises(NoCapacity):
        choose([old], need)
