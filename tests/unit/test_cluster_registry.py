import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.registry_table import (
    Listing,
    RegistryTable,
    RegistryView,
    address_from_dict,
    address_to_dict,
)
from contracts.ids import Incarnation, WorkerId
from contracts.worker import Role, WorkerAddress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def worker(name: str, incarnation: int = 1) -> WorkerAddress:
    return WorkerAddress(WorkerId(name), Role.DECODE, f"{name}.host:1", Incarnation(incarnation))


def names(listing: Listing) -> list[str]:
    return [address.worker_id for address in listing.workers]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> RegistryTable:
    return RegistryTable(incarnation=7, clock=clock, expiry_s=10.0)


def test_only_changes_make_a_new_version(table: RegistryTable) -> None:
    table.register(worker("b"))
    table.register(worker("a"))
    assert (table.version, names(table.listing())) == (2, ["a", "b"])
    table.register(worker("a"))  # a heartbeat
    table.unregister(WorkerId("none"), Incarnation(1))
    table.expire()
    assert table.version == 2
    table.register(worker("a", incarnation=2))  # restarted
    assert table.version == 3


def test_draining_workers_are_not_listed(table: RegistryTable) -> None:
    table.register(worker("a"))
    table.register(worker("a"), draining=True)
    assert (table.version, names(table.listing())) == (2, [])
    table.register(worker("a"), draining=True)  # it still lives
    table.unregister(WorkerId("a"), Incarnation(1))
    assert table.version == 2  # nobody needs to know


def test_silent_workers_expire(table: RegistryTable, clock: Clock) -> None:
    table.register(worker("silent"))
    clock.now += 6
    table.register(worker("alive"))
    clock.now += 6
    table.expire()
    assert names(table.listing()) == ["alive"]


def test_an_old_incarnation_cannot_remove_the_new_one(table: RegistryTable) -> None:
    table.register(worker("a", incarnation=2))
    table.unregister(WorkerId("a"), Incarnation(1))
    assert names(table.listing()) == ["a"]
    table.unregister(WorkerId("a"), Incarnation(2))
    assert names(table.listing()) == []


Step = tuple[str, str, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["register", "drain", "unregister", "wait"]),
        st.sampled_from(["a", "b"]),
        st.integers(1, 2),
    ),
    max_size=30,
)


@given(STEPS)
def test_the_version_changes_exactly_when_the_list_does(steps: list[Step]) -> None:
    clock = Clock()
    table = RegistryTable(incarnation=7, clock=clock, expiry_s=10.0)
    for action, name, incarnation in steps:
        before = table.listing()
        if action == "register":
            table.register(worker(name, incarnation))
        elif action == "drain":
            table.register(worker(name, incarnation), draining=True)
        elif action == "unregister":
            table.unregister(WorkerId(name), Incarnation(incarnation))
        else:
            clock.now += 6
            table.expire()
        after = table.listing()
        assert (before.version == after.version) == (before.workers == after.workers)


def test_a_view_outlives_a_restarted_registry(clock: Clock) -> None:
    view = RegistryView(clock, grace_s=6.0)
    assert view.update(Listing(1, 2, (worker("a"), worker("b"))))
    assert not view.update(Listing(2, 0, ()))  # restarted: nothing changes for the watcher
    assert view.workers == (worker("a"), worker("b"))
    assert view.grace_left_s == 6.0
    clock.now += 2
    assert view.update(Listing(2, 1, (worker("a", incarnation=5),)))
    assert view.workers == (worker("a", incarnation=5), worker("b"))
    clock.now += 4
    assert view.tick()  # b did not come back
    assert [address.worker_id for address in view.workers] == ["a"]
    assert view.grace_left_s is None


def test_a_second_restart_does_not_lose_what_was_carried(clock: Clock) -> None:
    view = RegistryView(clock, grace_s=6.0)
    view.update(Listing(1, 1, (worker("a"),)))
    view.update(Listing(2, 0, ()))
    clock.now += 5
    view.update(Listing(3, 0, ()))
    clock.now += 5
    assert not view.tick()
    assert view.workers == (worker("a"),)


def test_a_worker_that_left_after_the_restart_is_gone_at_once(clock: Clock) -> None:
    view = RegistryView(clock, grace_s=6.0)
    view.update(Listing(1, 1, (worker("a"),)))
    view.update(Listing(2, 1, (worker("a"),)))
    assert view.update(Listing(2, 2, ()))
    assert view.workers == ()


def test_addresses_travel_as_plain_data() -> None:
    fields = address_to_dict(worker("a"))
    assert all(type(value) in (str, int) for value in fields.values())
    assert address_from_dict({**fields, "from the future": 1}) == worker("a")
    with pytest.raises(ValueError, match="without role"):
        address_from_dict({"worker_id": "a"})
