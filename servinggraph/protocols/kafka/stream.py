"""The topics of one graph, served for as long as the server lives: sessions one after the other, with pauses between."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import (
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
)

from servinggraph.guards import backoff_s
from servinggraph.kafka import KafkaOptions
from servinggraph.lifecycle import Serving
from servinggraph.protocols.kafka.addressing import Addressing
from servinggraph.protocols.kafka.clients import Clients, answers, has_topic
from servinggraph.protocols.kafka.delivery import NotWritten
from servinggraph.protocols.kafka.exchange import Exchange
from servinggraph.protocols.kafka.failures import TopicMissing, is_expected, verdict_on, words_for
from servinggraph.protocols.kafka.pulse import Dropped
from servinggraph.protocols.kafka.recent import Recent
from servinggraph.protocols.kafka.records import Place, Verdict
from servinggraph.protocols.kafka.report import Counts
from servinggraph.protocols.kafka.session import Session

__all__ = ["Stream"]

logger = logging.getLogger("servinggraph.kafka")

_FIRST_S: Final = 0.25
_MOST_S: Final = 15.0
_TOPIC_S: Final = 5.0
_LAG_S: Final = 2.0
"""How often the lag is looked at, which also tells whether the brokers answer."""
_SILENT_S: Final = 30.0
"""After this long without an answer everything is connected anew, from the addresses of the options."""
_VERDICTS: Final = 1000


class Stream:
    """Serves one graph's topics.

    Attributes:
        graph: the graph's name.
        options: its `kafka:` block.
        counts: what happened since the start.
        state: what it does now, or why it does nothing, in words.
        verdicts: records whose answers the broker does not take, to be given up when they are read again.
        answered: records that an earlier session has answered, behind one that ended it.
        recent: requests that were answered lately.
        stop_by: moment on the loop's clock by which a stop has to be over.
        lag: records that wait in this member's partitions, at the last look; None before the first.

    Args:
        serving: the graphs, the slots, the limits.
        graph: the graph's name.
        options: its `kafka:` block.
        brokers: addresses instead of the block's; empty for the block's.
        notice: called after every change of `ready`.
    """

    def __init__(self, serving: Serving, graph: str, options: KafkaOptions, brokers: str, notice: Callable[[], None]) -> None:
        self.graph, self.options = graph, options
        self.counts = Counts()
        self.state = "connecting"
        self.clients = Clients(options, graph, brokers)
        self.exchange = Exchange(serving, graph, options)
        self.addressing = Addressing(options, graph, self.exchange)
        self.verdicts: dict[Place, Verdict] = {}
        self.answered: set[Place] = set()
        self.recent = Recent(options.duplicates)
        self.stop_by = 0.0
        self.lag: int | None = None
        self._unwritten = False
        self._notice = notice
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._session: Session | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; connects in the background, and again for as long as it takes."""
        self._task = self._loop.create_task(self._run(), name=f"kafka-{self.graph}")

    async def stop(self, grace_s: float) -> None:
        """Read no more, let what runs end within a time, write, commit, and leave the group."""
        self.stop_by = self._loop.time() + grace_s
        self._stop.set()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            began = self._loop.time()
            watching: asyncio.Task[None] | None = None
            try:
                self._session = session = Session(self)
                watching = self._loop.create_task(self._watch(session), name="kafka-watch")
                await session.run(self._stop)
            except Exception as error:
                failures = 1 if self._loop.time() - began > 2 * _MOST_S else failures + 1
                if self._failed(error):
                    failures = 1  # known, and done with: nobody has to wait for long because of it
                pause = backoff_s(failures, _FIRST_S, _MOST_S, jitter=True)
                if isinstance(error, Dropped):  # the other one of its name has just come: it may do something meanwhile
                    pause += self.options.input.session_timeout_ms / 1e3
                self.counts.reconnects += 1
                try:
                    await asyncio.wait_for(self._stop.wait(), pause)
                except TimeoutError:
                    pass
            finally:
                if watching is not None:
                    watching.cancel()
                    await asyncio.wait({watching})
        self.changed("stopped")

    def _failed(self, error: Exception) -> bool:
        """Note why a session ended, with a line in the log where that is news; True when the next one will not end of it."""
        verdict = verdict_on(error, self.clients)
        if verdict is not None and isinstance(error, NotWritten):
            self.verdicts[error.work.place] = verdict
            while len(self.verdicts) > _VERDICTS:
                del self.verdicts[next(iter(self.verdicts))]
        state = words_for(error, self.clients.brokers)
        if state != self.state:
            expected = is_expected(error)
            level = logging.WARNING if expected else logging.ERROR
            logger.log(level, "graph '%s', Kafka: %s; trying again", self.graph, state, exc_info=None if expected else error)
        self.changed(state)
        self._unwritten = isinstance(error, NotWritten) and verdict is None
        return verdict is not None

    def began(self) -> None:
        """Note that a session has its partitions.

        One after a record that could not be written has to last first: it is likely to end on the same one at once.
        """
        if not self._unwritten:
            self.changed("")

    def changed(self, state: str) -> None:
        """Note a change of the state; empty for one in which records are read."""
        if not state and self.state not in ("", "connecting"):
            logger.info("graph '%s', Kafka: reading again", self.graph)
        self.state = state
        self._notice()

    async def check_topics(self, consumer: AIOKafkaConsumer) -> None:
        """Find out before anything is read whether all topics are there.

        Raises:
            TopicMissing: one is not, or nothing of it may be known.
            RequestTimedOutError: the brokers do not say.
        """
        options = self.options
        needed = [(topic, "to be read") for topic in options.input.topics]
        needed += [(options.output.topic or "", "for answers"), (options.errors.topic or "", "for dead letters")]
        for topic, use in needed:
            try:
                there = not topic or await has_topic(consumer, topic, _TOPIC_S)
            except TopicAuthorizationFailedError as error:
                text = f"topic '{topic}' ({use}) may not be used: {self.clients.brokers} gives no rights on it"
                raise TopicMissing(text) from error
            if there is None:
                raise RequestTimedOutError(f"no word whether there is a topic '{topic}' ({use})")
            if not there:
                raise TopicMissing(f"there is no topic '{topic}' ({use}) at {self.clients.brokers}")

    async def _watch(self, session: Session) -> None:
        """Look at the lag now and then, which also tells whether the brokers answer."""
        heard = self._loop.time()
        while True:
            await asyncio.sleep(_LAG_S)
            if self._loop.time() - heard > _SILENT_S:
                # aiokafka looks for the cluster only where it was: its brokers may have other addresses by now.
                session.end(KafkaConnectionError(f"no answer for {_SILENT_S:.0f} s"))
            if not session.joined:
                if not session.connected or await answers(session.consumer, 2 * _LAG_S):
                    heard = self._loop.time()
                continue
            ready = self.ready
            try:
                self.lag = await asyncio.wait_for(self._lag_of(session), 2 * _LAG_S)
                heard = self._loop.time()
            except IllegalStateError:
                continue  # partitions were given out anew meanwhile
            except (KafkaError, TimeoutError):
                if session.joined and not self.state:
                    logger.warning("graph '%s', Kafka: no answer from %s; waiting", self.graph, self.clients.brokers)
                    self.changed(f"no answer from {self.clients.brokers}")
            else:
                if self.state and session.joined:
                    self.changed("")
            if ready != self.ready:
                self._notice()

    async def _lag_of(self, session: Session) -> int:
        """Return how many records of this member's partitions are not done.

        Raises:
            KafkaError: the brokers do not answer.
        """
        ends = await session.consumer.end_offsets(list(session.partitions))
        lag = 0
        for place, end in ends.items():
            partition = session.partitions.get(place)
            if partition is not None:
                # With nothing under way the consumer's: it is past the gaps that transactions leave.
                position = partition.offsets.position if len(partition.offsets) else None
                lag += max(0, end - (await session.consumer.position(place) if position is None else position))
        return lag

    def describe(self) -> str:
        """Say in a line what is read and written, and with which promise."""
        options = self.options
        read = ", ".join(options.input.topics)
        written = options.output.topic or ", ".join(options.output.reply_topics)
        promise = options.delivery.replace("_", " ")
        return f"{self.clients.brokers}: {self.graph} reads {read} as group {options.input.group}, writes {written}, {promise}"

    @property
    def ready(self) -> bool:
        """True while this is no reason for the server not to be ready."""
        return self.options.input.readiness == "ignored" or self.reading

    @property
    def reading(self) -> bool:
        """True while this member is in its group, the brokers answer, and its lag is within its limit, if there is one."""
        session, limit = self._session, self.options.input.max_lag
        joined = session is not None and session.joined and not self.state
        return joined and (limit is None or self.lag is None or self.lag <= limit)

    def report(self) -> dict[str, Any]:
        """Return what can be told of it, as plain values."""
        session = self._session
        now = self._loop.time()
        told: dict[str, Any] = {
            "graph": self.graph,
            "group": self.options.input.group,
            "delivery": self.options.delivery,
            "ready": self.reading,
            "state": self.state or ("reading" if session is not None and session.joined else "waiting for its group"),
            "lag": self.lag,
            **self.counts.plain(),
        }
        if session is not None:
            told |= {
                "partitions": [f"{place.topic}/{place.partition}" for place in sorted(session.partitions)],
                "in_flight": session.runner.running,
                "waiting": session.budget.records,
                "waiting_bytes": session.budget.size,
                "unwritten": session.delivery.unwritten,
                "paused": session.budget.full,
                "commit_age_s": round(now - session.delivery.committed_at, 3),
                "positions": {
                    f"{place.topic}/{place.partition}": partition.offsets.position
                    for place, partition in session.partitions.items()
                },
            }
        return told
