"""Which waiting requests form the next batch, and when: pure decisions.

No clock, no await, no tensors: time comes in as numbers, so every rule is tested with
numbers. Semantics after Triton's dynamic batcher (priorities, preferred sizes, queue
policies), with what it lacks: members of different `key` never meet and never hold each
other up, and a request that finds the node idle does not wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from heapq import heapify, heappop, heappush
from math import inf
from typing import Generic, Protocol, TypeVar

from servinggraph.interfaces import BatchPolicy

__all__ = ["BatchQueue", "Member"]


class Member(Protocol):
    """What the queue needs to know of a waiting piece of work.

    Attributes:
        rows: number of rows, 0 to `max_rows`.
        key: members of one batch have equal keys (datatypes and shapes without the first axis).
        priority: 1 is served first; 0 or out of range takes the default level.
        deadline: moment after which it must not run any more; None without one.
        counts: False for what is part of a request that was counted already.
        gone: True when nobody waits for it any more.
    """

    rows: int
    key: Hashable
    priority: int
    deadline: float | None
    counts: bool

    @property
    def gone(self) -> bool: ...


MemberT = TypeVar("MemberT", bound=Member)


class _Place(Generic[MemberT]):
    """A place in the queue; empty once its member has left it."""

    __slots__ = ("leaves_at", "level", "member", "number")

    def __init__(self, member: MemberT, number: int, level: int, leaves_at: float) -> None:
        self.member: MemberT | None = member
        self.number = number
        self.level = level
        self.leaves_at = leaves_at


class _Group(Generic[MemberT]):
    """Members of one key: a deque for each level, and what they sum up to."""

    __slots__ = ("levels", "members", "rows")

    def __init__(self) -> None:
        # Level 2n is priority n; level 2n+1 holds its members that are over the queue time-out
        # but may continue: behind all unexpired ones of that priority.
        self.levels: dict[int, deque[_Place[MemberT]]] = {}
        self.members = 0
        self.rows = 0

    def in_order(self) -> Iterable[deque[_Place[MemberT]]]:
        levels = self.levels
        return [levels[n] for n in sorted(levels)] if len(levels) > 1 else levels.values()


def _forget(member: object) -> None:
    """Do nothing about a member that has gone."""


class BatchQueue(Generic[MemberT]):
    """Waiting members in order of level, then arrival, apart by key. Not thread-safe.

    Args:
        policy: sizes, delays and limits.
        on_gone: told each member that leaves the queue because nobody waits for it any more.
    """

    def __init__(self, policy: BatchPolicy, on_gone: Callable[[MemberT], None] = _forget) -> None:
        self._on_gone = on_gone
        self._max_rows = policy.max_rows
        self._delay = policy.max_delay_ms / 1e3
        self._preferred = sorted(policy.preferred_rows or [policy.max_rows])
        self._wait_when_idle = policy.wait_when_idle
        self._max_queue = policy.max_queue
        self._timeout = None if policy.queue_timeout_ms is None else policy.queue_timeout_ms / 1e3
        self._continue = policy.on_timeout == "continue"
        self._levels = policy.priorities
        self._default_level = policy.default_priority or policy.priorities
        self._groups: dict[Hashable, _Group[MemberT]] = {}
        self._expiries: list[tuple[float, int, _Place[MemberT]]] = []
        self._tidy_at = 1024
        self._size = 0
        self._number = 0

    def __len__(self) -> int:
        """Number of requests waiting; some of them may have lost their caller and not be missed yet."""
        return self._size

    @property
    def waiting(self) -> bool:
        """True when anything is queued."""
        return bool(self._groups)

    @property
    def full(self) -> bool:
        """True when `max_queue` requests are waiting: one more must not be put."""
        if self._size >= self._max_queue:
            self._drop_gone()
        return self._size >= self._max_queue

    def put(self, member: MemberT, now: float, *, idle: bool) -> float | None:
        """Queue a member.

        Args:
            member: the member; its `rows` must not exceed `max_rows`.
            now: the time.
            idle: True when no batch is running.

        Returns:
            The moment at which `expire` would find it waiting too long; None without a limit.
        """
        leaves_at = now
        if self._delay and (self._wait_when_idle or not idle or self._anybody_waits()):
            leaves_at += self._delay
        expires = member.deadline
        if self._timeout is not None and (expires is None or now + self._timeout < expires):
            expires = now + self._timeout
        self._insert(member, 2 * self._level(member), leaves_at, expires)
        return expires

    def put_back(self, member: MemberT, now: float) -> None:
        """Queue a member that has been in a batch, to run by itself: its `key` must be its own.

        It is due at once, behind those of its level that wait already, and only its deadline
        can expire, since it has not waited too long but had bad company.
        """
        self._insert(member, 2 * self._level(member), now, member.deadline)

    def expire(self, now: float) -> list[MemberT]:
        """Remove and return members whose time is up; those that may continue move back instead."""
        expired: list[MemberT] = []
        while self._expiries and self._expiries[0][0] <= now:
            place = heappop(self._expiries)[2]
            member = place.member
            if member is None:
                continue
            self._remove(place, member)
            if self._continue and (member.deadline is None or member.deadline > now):
                self._insert(member, place.level + 1, place.leaves_at, member.deadline)
            else:
                expired.append(member)
        return expired

    def take(self, now: float) -> list[MemberT]:
        """Remove and return the members of the next batch; empty when none is due at `now`.

        Call `expire` first. Members that are gone are dropped on the way.
        """
        best: _Place[MemberT] | None = None
        chosen: _Group[MemberT] | None = None
        room = 0
        for group in list(self._groups.values()):
            front, leaves_at = self._look(group)
            if front is None or (best is not None and (best.level, best.number) < (front.level, front.number)):
                continue
            allowed = self._max_rows if leaves_at <= now else self._rows_before_delay(group)
            if allowed:
                best, chosen, room = front, group, allowed
        return [] if chosen is None else self._fill(chosen, room)

    def next_event(self, *, busy: bool) -> float | None:
        """Return the earliest moment at which `expire` (or, unless busy, `take`) can do something new."""
        moment = inf
        if not busy:
            for group in list(self._groups.values()):
                moment = min(moment, self._look(group)[1])
        while self._expiries and self._expiries[0][2].member is None:
            heappop(self._expiries)
        if self._expiries:
            moment = min(moment, self._expiries[0][0])
        return None if moment == inf else moment

    def clear(self) -> list[MemberT]:
        """Remove and return everything."""
        members = [
            place.member
            for group in self._groups.values()
            for places in group.in_order()
            for place in places
            if place.member is not None
        ]
        self._groups.clear()
        self._expiries.clear()
        self._size = 0
        return members

    def _level(self, member: MemberT) -> int:
        return member.priority if 1 <= member.priority <= self._levels else self._default_level

    def _insert(self, member: MemberT, level: int, leaves_at: float, expires: float | None) -> None:
        self._number += 1
        place = _Place(member, self._number, level, leaves_at)
        group = self._groups.get(member.key)
        if group is None:
            group = self._groups[member.key] = _Group()
        places = group.levels.get(level)
        if places is None:
            places = group.levels[level] = deque()
        places.append(place)
        group.members += 1
        group.rows += member.rows
        self._size += member.counts
        if len(places) > 2 * group.members + 64:
            # A front that cannot leave, behind a run that hangs say, keeps places of those that
            # expired behind it from being passed.
            group.levels[level] = deque(place for place in places if place.member is not None)
        if expires is not None:
            heappush(self._expiries, (expires, place.number, place))
            if len(self._expiries) > self._tidy_at:
                # Places that were left stay in the heap until their moment; far ones must not pile up.
                self._expiries = [entry for entry in self._expiries if entry[2].member is not None]
                heapify(self._expiries)
                self._tidy_at = 2 * len(self._expiries) + 1024

    def _remove(self, place: _Place[MemberT], member: MemberT) -> None:
        """Empty a place; whoever comes by drops it from its deque."""
        place.member = None
        self._size -= member.counts
        group = self._groups[member.key]
        group.members -= 1
        group.rows -= member.rows
        if group.members == 0:
            del self._groups[member.key]

    def _look(self, group: _Group[MemberT]) -> tuple[_Place[MemberT] | None, float]:
        """Return a group's first place that is still wanted, and when one of the group must leave."""
        front: _Place[MemberT] | None = None
        leaves_at = inf
        for places in group.in_order():
            while places:
                place = places[0]
                member = place.member
                if member is not None and not member.gone:
                    front = front or place
                    leaves_at = min(leaves_at, place.leaves_at)
                    break
                places.popleft()
                if member is not None:
                    self._remove(place, member)
                    self._on_gone(member)
        return front, leaves_at

    def _anybody_waits(self) -> bool:
        return any(self._look(group)[0] is not None for group in list(self._groups.values()))

    def _rows_before_delay(self, group: _Group[MemberT]) -> int:
        """Return how many rows may leave while the delay runs: a preferred size, or a batch that cannot grow; else 0."""
        if group.rows < self._preferred[0]:
            return 0
        total = preferred = 0
        for places in group.in_order():
            for place in places:
                member = place.member
                if member is None or member.gone:
                    continue
                if total + member.rows > self._max_rows:
                    return preferred or total
                total += member.rows
                if total in self._preferred:
                    preferred = total
        return preferred or (total if total >= self._preferred[-1] else 0)

    def _fill(self, group: _Group[MemberT], room: int) -> list[MemberT]:
        """Take members in order, as many as there is room for."""
        batch: list[MemberT] = []
        for places in group.in_order():
            while places:
                place = places[0]
                member = place.member
                if member is not None:
                    if not member.gone:
                        if member.rows > room:
                            return batch  # keep the order: nothing overtakes a larger request
                        batch.append(member)
                        room -= member.rows
                    else:
                        self._on_gone(member)
                    self._remove(place, member)
                places.popleft()
        return batch

    def _drop_gone(self) -> None:
        for group in list(self._groups.values()):
            for places in group.in_order():
                for place in places:
                    member = place.member
                    if member is not None and member.gone:
                        self._remove(place, member)
                        self._on_gone(member)
