"""How far the one order of all events may be read, by a model of PostgreSQL: every interleaving of
a reader's steps with those of a few sessions, up to a size at which each wrong rule is found out.

A job's later event may stand further on than its transaction's number, never before it, so the
model has events at their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest

OURS, FOREIGN = "ours", "foreign"
NUMBERS = 3
CONNECTS = 3
SLOTS = 2


class Session(NamedTuple):
    """What is in one slot of the list of sessions. `home` never changes while it lasts."""

    home: str
    number: int | None = None  # of its transaction, once that has one
    wrote: bool = False


class Prepared(NamedTuple):
    number: int
    home: str
    wrote: bool


class Snapshot(NamedTuple):
    following: int
    running: frozenset[int]


class World(NamedTuple):
    slots: tuple[Session | None, ...] = (None,) * SLOTS
    prepared: frozenset[Prepared] = frozenset()
    following: int = 1  # the next number
    connects: int = CONNECTS
    # The reader's.
    step: int = 0
    snapshot: Snapshot | None = None
    home: str | None = None  # copied from the slot that is looked at
    seen: frozenset[tuple[int, str]] = frozenset()  # numbers, and where they belong
    bound: int = 0  # below this it has read
    late: frozenset[int] = frozenset()  # events that were not in the snapshot

    @property
    def missed(self) -> bool:
        return any(number < self.bound for number in self.late)

    def put(self, slot: int, session: Session | None) -> World:
        return self._replace(slots=(*self.slots[:slot], session, *self.slots[slot + 1 :]))

    def commit(self, number: int, *, wrote: bool) -> World:
        if not wrote or self.snapshot is None:
            return self
        return self._replace(late=self.late | {number})


def sessions_move(world: World) -> Iterator[World]:
    for slot, session in enumerate(world.slots):
        if session is None:
            if world.connects:
                fewer = world._replace(connects=world.connects - 1)
                yield from (fewer.put(slot, Session(home)) for home in (OURS, FOREIGN))
        else:
            yield world.put(slot, None)  # it ends, and takes back what it did
            yield from transaction_moves(world, slot, session)
    for each in world.prepared:
        ended = world._replace(prepared=world.prepared - {each})
        yield ended
        yield ended.commit(each.number, wrote=each.wrote)


def transaction_moves(world: World, slot: int, session: Session) -> Iterator[World]:
    number = session.number
    if world.following <= NUMBERS:  # its own, or that of a sub-transaction
        taken = world._replace(following=world.following + 1)
        first = session._replace(number=number or world.following)
        yield taken.put(slot, first)
    if number is None:
        return
    if session.home == OURS and not session.wrote:
        yield world.put(slot, session._replace(wrote=True))
    idle = world.put(slot, Session(session.home))
    yield idle  # rolled back
    yield idle.commit(number, wrote=session.wrote)
    prepared = Prepared(number, session.home, session.wrote)
    yield idle._replace(prepared=idle.prepared | {prepared})


SLOT_BY_SLOT = tuple(f"{what} {slot}" for slot in range(SLOTS) for what in ("home", "number"))
RULE = ("snapshot", *SLOT_BY_SLOT, "prepared", "read")


def reader_moves(world: World, steps: Sequence[str], unseen: str) -> World | None:
    if world.step == len(steps):
        return None
    what, _, slot = steps[world.step].partition(" ")
    world = world._replace(step=world.step + 1)
    if what == "snapshot":
        running = {session.number for session in world.slots if session and session.number}
        running |= {each.number for each in world.prepared}
        return world._replace(snapshot=Snapshot(world.following, frozenset(running)))
    if what == "prepared":
        found = {(each.number, each.home) for each in world.prepared}
        return world._replace(seen=world.seen | found)
    if what == "read":
        return world._replace(bound=bound(world, unseen), seen=frozenset())
    session = world.slots[int(slot)]
    if what == "home":
        return world._replace(home=session.home if session else None)
    if session and session.number and world.home:
        world = world._replace(seen=world.seen | {(session.number, world.home)})
    return world._replace(home=None)


def bound(world: World, unseen: str) -> int:
    """`unseen`: where whoever is not seen belongs."""
    assert world.snapshot is not None
    homes = dict(world.seen)
    counted = {n for n in world.snapshot.running if homes.get(n, unseen) == OURS}
    return min(counted, default=world.snapshot.following)


def misses(steps: Sequence[str], unseen: str = OURS) -> tuple[bool, int]:
    """Whether an event can come to lie below the bound that was not in the snapshot; and how many
    worlds were looked at."""
    known, left = {World()}, [World()]
    while left:
        world = left.pop()
        if world.missed:
            return True, len(known)
        read = reader_moves(world, steps, unseen)
        for after in (*sessions_move(world), *([read] if read else [])):
            if after not in known:
                known.add(after)
                left.append(after)
    return False, len(known)


def test_whoever_is_seen_after_the_snapshot_can_be_passed_over() -> None:
    missed, count = misses(RULE)
    assert not missed
    assert count > 10_000


@pytest.mark.parametrize(
    ("steps", "unseen"),
    [
        ((*SLOT_BY_SLOT, "prepared", "snapshot", "read"), OURS),  # who is seen may have ended
        (("home 0", "snapshot", "number 0", "read"), OURS),
        (RULE, FOREIGN),  # who has ended may be ours
        (("snapshot", *SLOT_BY_SLOT, "read"), FOREIGN),
    ],
)
def test_another_rule_misses_something(steps: Sequence[str], unseen: str) -> None:
    missed, _ = misses(steps, unseen)
    assert missed


def test_one_that_is_foreign_holds_up_nobody() -> None:
    world: World | None = World(slots=(Session(FOREIGN, 1), Session(OURS, 2)), following=3)
    for _ in RULE:
        assert world is not None
        world = reader_moves(world, RULE, OURS)
    assert world is not None
    assert world.bound == 2
