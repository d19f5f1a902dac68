"""Which waiting requests form the next batch, and when: pure decisions.

No clock, no await, no tensors: time comes in as numbers, so every rule is tested with
numbers. Semantics after Triton's dynamic batcher (priorities, preferred sizes, queue
policies), with what it lacks: members of different `key` never meet, a batch is filled
past members that do not fit in, and a request that finds the node idle does not wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Protocol

from servinggraph.interfaces import BatchPolicy

__all__ = ["BatchQueue", "Member", "QueueFull"]


class QueueFull(Exception):
    """The queue holds `max_queue` requests already."""


class Member(Protocol):
    """What the queue needs to know of a waiting piece of work.

    Attributes:
        rows: number of rows, 1 to `max_rows`.
        key: members of one batch have equal keys (datatypes and shapes without the first axis).
        priority: 1 is served first; 0 or out of range takes the default level.
        deadline: moment after which it must not run any more; None without one.
        counts: False for the second and later pieces of one request, which is counted once.
        gone: True when nobody waits for it any more.
    """

    rows: int
    key: Hashable
    priority: int
    deadline: float | None
    counts: bool

    @property
    def gone(self) -> bool: ...


class _Place:
    """A member's place in the queue."""

    __slots__ = ("leaves_at", "level", "member", "number", "taken")

    def __init__(self, member: Member, number: int, level: int, leaves_at: float) -> None:
        self.member = member
        self.number = number
        self.level = level
        self.leaves_at = leaves_at
        self.taken = False


class _Group:
    """Members of one key: a deque for each level, and what they sum up to."""

    __slots__ = ("levels", "members", "rows")

    def __init__(self) -> None:
        # Level 2n is priority n; level 2n+1 holds its members that are over the queue time-out
        # but may continue: behind all unexpired ones of that priority.
        self.levels: dict[int, deque[_Place]] = {}
        self.members = 0
        self.rows = 0

    def in_order(self) -> list[deque[_Place]]:
        levels = self.levels
        return [levels[n] for n in sorted(levels)] if len(levels) > 1 else list(levels.values())


class BatchQueue:
    """Waiting members in order of level, then arrival, apart by key. Not thread-safe."""

    def __init__(self, policy: BatchPolicy) -> None:
        self._max_rows = policy.max_rows
        self._delay = policy.max_delay_ms / 1e3
        self._preferred = sorted(policy.preferred_rows or [policy.max_rows])
        self._wait_when_idle = policy.wait_when_idle
        self._max_queue = policy.max_queue
        self._timeout = None if policy.queue_timeout_ms is None else policy.queue_timeout_ms / 1e3
        self._continue = policy.on_timeout == "continue"
        self._levels = policy.priorities
        self._default_level = policy.default_priority or policy.priorities
        self._groups: dict[Hashable, _Group] = {}
        self._expiries: list[tuple[float, int, _Place]] = []
        self._size = 0
        self._number = 0

    def __len__(self) -> int:
        """Number of requests waiting, those included whose caller has gone since the last `take`."""
        return self._size

    @property
    def waiting(self) -> bool:
        """True when anything is queued."""
        return bool(self._groups)

    def put(self, member: Member, now: float, *, idle: bool) -> None:
        """Queue a member.

        Args:
            member: the member; its `rows` must not exceed `max_rows`.
            now: the time.
            idle: True when no batch is running.

        Raises:
            QueueFull: `max_queue` requests are waiting; the member was not queued.
        """
        if member.counts and self._size >= self._max_queue:
            self._drop_gone()
            if self._size >= self._max_queue:
                raise QueueFull
        waits = self._wait_when_idle or not idle or bool(self._groups)
        level = member.priority if 1 <= member.priority <= self._levels else self._default_level
        self._number += 1
        place = _Place(member, self._number, 2 * level, now + self._delay if waits else now)
        self._append(place)
        self._size += member.counts
        expires = member.deadline
        if self._timeout is not None and (expires is None or now + self._timeout < expires):
            expires = now + self._timeout
        if expires is not None:
            self._expire_at(place, expires)

    def expire(self, now: float) -> list[Member]:
        """Remove and return members whose time is up; those that may continue move back instead."""
        expired: list[Member] = []
        while self._expiries and self._expiries[0][0] <= now:
            place = heappop(self._expiries)[2]
            if place.taken:
                continue
            self._take_out(place)
            deadline = place.member.deadline
            if self._continue and (deadline is None or deadline > now):
                self._move_back(place, deadline)
            else:
                self._size -= place.member.counts
                expired.append(place.member)
        return expired

    def take(self, now: float) -> list[Member]:
        """Remove and return the members of the next batch; empty when none is due at `now`.

        Call `expire` first. Members that are gone are dropped on the way.
        """
        while self._groups:
            key = self._next_key(now)
            if key is None:
                return []
            batch = self._fill(key, now)
            if batch:
                return batch
        return []

    def next_event(self, *, busy: bool) -> float | None:
        """Return the earliest moment at which `expire` (or, unless busy, `take`) can do something new."""
        moments = []
        for group in [] if busy else list(self._groups.values()):
            front = self._front(group)
            if front is not None:
                moments.append(front.leaves_at)
        while self._expiries and self._expiries[0][2].taken:
            heappop(self._expiries)
        if self._expiries:
            moments.append(self._expiries[0][0])
        return min(moments, default=None)

    def clear(self) -> list[Member]:
        """Remove and return everything."""
        members = [
            place.member
            for group in self._groups.values()
            for places in group.in_order()
            for place in places
            if not place.taken
        ]
        self._groups.clear()
        self._expiries.clear()
        self._size = 0
        return members

    def _append(self, place: _Place) -> None:
        member = place.member
        group = self._groups.get(member.key)
        if group is None:
            group = self._groups[member.key] = _Group()
        places = group.levels.get(place.level)
        if places is None:
            places = group.levels[place.level] = deque()
        places.append(place)
        group.members += 1
        group.rows += member.rows

    def _take_out(self, place: _Place) -> None:
        """Strike a place out; where it stands in the middle its deque drops it later."""
        place.taken = True
        member = place.member
        group = self._groups[member.key]
        group.members -= 1
        group.rows -= member.rows
        if group.members == 0:
            del self._groups[member.key]

    def _expire_at(self, place: _Place, moment: float) -> None:
        heappush(self._expiries, (moment, place.number, place))
        if len(self._expiries) > 2 * self._max_queue + 1024:
            # Served members stay in the heap until their moment; far deadlines must not pile up.
            self._expiries = [entry for entry in self._expiries if not entry[2].taken]
            heapify(self._expiries)

    def _move_back(self, place: _Place, deadline: float | None) -> None:
        self._number += 1
        later = _Place(place.member, self._number, place.level + 1, place.leaves_at)
        self._append(later)
        if deadline is not None:
            self._expire_at(later, deadline)

    def _front(self, group: _Group) -> _Place | None:
        """Return the first place of a group that is still wanted, dropping others before it."""
        for places in group.in_order():
            while places:
                place = places[0]
                if not place.taken and not place.member.gone:
                    return place
                places.popleft()
                if not place.taken:
                    self._size -= place.member.counts
                    self._take_out(place)
        return None

    def _next_key(self, now: float) -> Hashable | None:
        """Return the key whose batch is due: of those due, lowest level, then longest waiting."""
        best: _Place | None = None
        for group in list(self._groups.values()):
            front = self._front(group)
            if front is None or (front.leaves_at > now and group.rows < self._preferred[0]):
                continue
            if best is None or (front.level, front.number) < (best.level, best.number):
                best = front
        return None if best is None else best.member.key

    def _fill(self, key: Hashable, now: float) -> list[Member]:
        """Take members of one key in order: up to `max_rows`, or, while the delay runs, a preferred size."""
        group = self._groups[key]
        front = self._front(group)
        if front is None:
            return []
        room = self._max_rows
        if front.leaves_at > now:
            room = max(size for size in self._preferred if size <= group.rows)
            room = max(room, front.member.rows)
        batch: list[Member] = []
        for places in group.in_order():
            while places:
                place = places[0]
                member = place.member
                if not place.taken:
                    if not member.gone and member.rows > room:
                        return batch  # keep the order: nothing overtakes a larger request
                    self._size -= member.counts
                    self._take_out(place)
                    if not member.gone:
                        batch.append(member)
                        room -= member.rows
                places.popleft()
        return batch

    def _drop_gone(self) -> None:
        for group in list(self._groups.values()):
            for places in group.in_order():
                for place in places:
                    if not place.taken and place.member.gone:
                        self._size -= place.member.counts
                        self._take_out(place)
