"""Which request of which sequence may run, and which sequences there are: pure decisions.

No await, no clock, no models: time comes in as numbers, and what was decided goes out as a
list of requests that may run or that are refused. Semantics after Triton's sequence batcher.
`sequencer` waits and runs.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from typing import Any, Final

from servinggraph.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    ServingGraphError,
    Unavailable,
)
from servinggraph.interfaces import SequencePolicy
from servinggraph.sequence import SequenceId, Turn

__all__ = ["Place", "SequenceTable", "Verdict"]

logger = logging.getLogger("servinggraph.sequences")

_NEVER: Final = -1


class Place:
    """One request's place among those of its sequence.

    Attributes:
        id: the sequence.
        start: True when the request begins it.
        end: True when it is the last.
        run: number of the run of this id that it belongs to: each start begins a new run.
        sequence: the entry of the table that it stands in, once it has arrived.
        turn: what its steps see, once it may run.
    """

    __slots__ = ("end", "id", "run", "sequence", "start", "turn")

    def __init__(self, id: SequenceId, *, start: bool = False, end: bool = False) -> None:
        self.id = id
        self.start = start
        self.end = end
        self.run = 0
        self.sequence: _Sequence | None = None
        self.turn: Turn | None = None


Verdict = tuple[Place, ServingGraphError | None]
"""A request that may run now, or that is refused with this error."""


class _Sequence:
    """Requests of one id: at most one runs, the others wait in order of arrival."""

    __slots__ = ("has_place", "idle_since", "last_run", "live_run", "queue", "running", "states")

    def __init__(self, *, has_place: bool) -> None:
        self.has_place = has_place  # False in the backlog
        self.queue: deque[Place] = deque()
        self.running: Place | None = None
        self.last_run = 0  # of the start that arrived last
        self.live_run = _NEVER  # whose state this is
        self.states: dict[str, dict[str, Any]] = {}
        self.idle_since = 0.0

    def forget(self) -> None:
        """End the run that is under way; what it kept is dropped."""
        self.live_run = _NEVER
        self.states = {}


class SequenceTable:
    """All sequences of one graph. Not thread-safe.

    Args:
        graph: its name, for error texts.
        policy: limits.
    """

    def __init__(self, graph: str, policy: SequencePolicy) -> None:
        self._graph = graph
        self._idle_s = policy.idle_ms / 1e3
        self._max = policy.max
        self._max_backlog = policy.max_backlog
        self._max_queue = policy.max_queue
        self._sequences: dict[SequenceId, _Sequence] = {}
        self._backlog: OrderedDict[SequenceId, _Sequence] = OrderedDict()
        self._idle: OrderedDict[SequenceId, _Sequence] = OrderedDict()
        self._refuses_new = False
        self._closed = False

    def __len__(self) -> int:
        """Number of sequences, those that wait for a place included."""
        return len(self._sequences)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place."""
        return len(self._backlog)

    def arrive(self, place: Place, now: float) -> list[Verdict]:
        """Let a request in: it runs at once, or waits.

        Args:
            place: the request.
            now: the time, seconds.

        Raises:
            InvalidRequest: it belongs to no sequence that there is, and starts none.
            LimitExceeded: too many sequences, or requests of this one, wait.
            Unavailable: it would start a sequence, and the server is stopping; or the graph has stopped.
        """
        if self._closed:
            raise Unavailable("is shutting down")
        sequence = self._sequences.get(place.id)
        if place.start and self._refuses_new:
            raise Unavailable(f"the server is shutting down: sequence {place.id} cannot start any more")
        if sequence is None:
            if not place.start:
                raise self._not_started(place)
            sequence = self._begin(place)
        elif len(sequence.queue) >= self._max_queue:
            limit = f"{self._max_queue} requests of it wait already (limit 'sequences.max_queue')"
            raise LimitExceeded(f"sequence {place.id} is full: {limit}")
        if place.start:
            sequence.last_run += 1
        place.run = sequence.last_run
        place.sequence = sequence
        sequence.idle_since = now
        self._idle.pop(place.id, None)
        sequence.queue.append(place)
        return self._advance(place.id, sequence)

    def finish(self, place: Place, now: float, *, failed: bool = False) -> list[Verdict]:
        """Note that a request's work has ended; the next of its sequence may run."""
        sequence = self._of(place)
        if sequence is None or sequence.running is not place:
            return []
        sequence.running = None
        if not failed and place.turn is not None and sequence.live_run == place.run:
            if place.end:
                sequence.forget()
            else:
                sequence.states.update(place.turn.kept)
        elif failed and place.start and sequence.live_run == place.run:
            sequence.forget()  # what failed to start is not there
        sequence.idle_since = now
        return self._advance(place.id, sequence)

    def cancel(self, place: Place, now: float) -> list[Verdict]:
        """End a request's sequence, because its caller gave up that request.

        Those of the same run that wait are refused. One that runs, `place` too, still has to `finish`.
        """
        sequence = self._of(place)
        if sequence is None:
            return []
        if sequence.live_run == place.run:
            sequence.forget()
        left = [other for other in sequence.queue if other.run == place.run]
        sequence.queue = deque(other for other in sequence.queue if other.run != place.run)
        text = f"sequence {place.id} was cancelled: the caller of one of its requests went away"
        verdicts: list[Verdict] = [(other, Cancelled(text)) for other in left if other is not place]
        sequence.idle_since = now
        return verdicts + self._advance(place.id, sequence)

    def expire(self, place: Place, now: float) -> list[Verdict]:
        """Refuse a waiting request whose time is up; in the backlog its whole sequence."""
        sequence = self._of(place)
        if sequence is None or place not in sequence.queue:
            return []
        if sequence.has_place:
            sequence.queue.remove(place)
            error = DeadlineExceeded("Request timeout expired while it waited for its turn in the sequence")
            return [(place, error), *self._advance(place.id, sequence)]
        return self._refuse_all(place.id, sequence, "timeout of the corresponding sequence has been expired")

    def free_idle(self, now: float) -> list[Verdict]:
        """End the sequences that had no request for too long; those of the backlog move up."""
        verdicts: list[Verdict] = []
        while self._idle:
            key, sequence = next(iter(self._idle.items()))
            if sequence.idle_since + self._idle_s > now:
                break
            del self._idle[key]
            sequence.forget()
            verdicts += self._advance(key, sequence)
        return verdicts

    def next_idle_end(self) -> float | None:
        """Return when `free_idle` will have something to do; None while nothing is idle."""
        if not self._idle:
            return None
        return next(iter(self._idle.values())).idle_since + self._idle_s

    def refuse_new(self) -> list[Verdict]:
        """Let no sequence begin any more, those of the backlog included; what has begun goes on."""
        self._refuses_new = True
        verdicts: list[Verdict] = []
        for key, sequence in list(self._backlog.items()):
            verdicts += self._refuse_all(key, sequence, "is shutting down")
        return verdicts

    def close(self) -> list[Verdict]:
        """Refuse all that waits and drop every state."""
        self._closed = True
        verdicts: list[Verdict] = []
        for key, sequence in list(self._sequences.items()):
            verdicts += self._refuse_all(key, sequence, "is shutting down")
        self._sequences.clear()
        self._idle.clear()
        return verdicts

    def _begin(self, place: Place) -> _Sequence:
        has_place = len(self._sequences) - len(self._backlog) < self._max
        if not has_place and len(self._backlog) >= self._max_backlog:
            limits = f"'sequences.max' = {self._max}, and 'sequences.max_backlog' = {self._max_backlog} wait for a place"
            raise LimitExceeded(f"sequence {place.id} cannot start: there are too many (limit {limits})")
        sequence = self._sequences[place.id] = _Sequence(has_place=has_place)
        if not has_place:
            self._backlog[place.id] = sequence
        return sequence

    def _advance(self, key: SequenceId, sequence: _Sequence) -> list[Verdict]:
        """Let the next request run; a sequence that has none and is not under way makes room for another."""
        verdicts: list[Verdict] = []
        while sequence.has_place and sequence.running is None and sequence.queue:
            place = sequence.queue.popleft()
            if place.start:
                if sequence.live_run != _NEVER:
                    logger.warning("graph '%s': sequence %s starts anew; the one under way is ended", self._graph, key)
                sequence.forget()
                sequence.live_run = place.run
            elif place.run != sequence.live_run:
                # Its start failed or was too late, or an end came before it.
                verdicts.append((place, self._not_started(place)))
                continue
            sequence.running = place
            place.turn = Turn(key, sequence.states, start=place.start, end=place.end)
            verdicts.append((place, None))
        if sequence.running is None and not sequence.queue:
            if sequence.live_run != _NEVER:
                self._idle[key] = sequence
            else:
                verdicts += self._remove(key, sequence)
        return verdicts

    def _remove(self, key: SequenceId, sequence: _Sequence) -> list[Verdict]:
        del self._sequences[key]
        if not sequence.has_place:
            del self._backlog[key]
            return []
        if not self._backlog:
            return []
        first, waiting = self._backlog.popitem(last=False)
        waiting.has_place = True
        return self._advance(first, waiting)

    def _refuse_all(self, key: SequenceId, sequence: _Sequence, reason: str) -> list[Verdict]:
        verdicts: list[Verdict] = [(place, Unavailable(reason)) for place in sequence.queue]
        sequence.queue.clear()
        if not sequence.has_place:
            del self._sequences[key]
            del self._backlog[key]
        return verdicts

    def _of(self, place: Place) -> _Sequence | None:
        """Return the entry that a request stands in, unless the table was closed meanwhile."""
        sequence = place.sequence
        return sequence if sequence is not None and self._sequences.get(place.id) is sequence else None

    def _not_started(self, place: Place) -> InvalidRequest:
        return InvalidRequest(
            f"inference request for sequence {place.id} to model '{self._graph}' must specify the START flag "
            "on the first request of the sequence"
        )
