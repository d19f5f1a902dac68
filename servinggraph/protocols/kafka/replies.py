"""Reply topics that requests name: which of them there are, looked up before a request runs."""

from __future__ import annotations

import asyncio
from typing import Final

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import TopicAuthorizationFailedError

from servinggraph.errors import InvalidRequest, Unavailable
from servinggraph.kafka import headers as names
from servinggraph.protocols.kafka.clients import has_topic, partitions_of
from servinggraph.protocols.kafka.records import Work

__all__ = ["ReplyTopics"]

_LOOK_UP_S: Final = 2.0
_MISSING_S: Final = 30.0
"""How long a topic that was not there is taken to be missing: a look-up takes its time."""
_MOST: Final = 1000


class ReplyTopics:
    """Knows which topics there are, so that a request that names none of them does no harm to others.

    Args:
        consumer: asks the brokers.
    """

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self._missing: dict[str, tuple[float, str]] = {}
        self._loop = asyncio.get_running_loop()

    async def check(self, topic: str, work: Work) -> None:
        """Find out whether a reply can be written.

        Raises:
            InvalidRequest: there is no such topic, or no such partition of it, or it may not be used.
            Unavailable: the brokers do not answer.
        """
        known = partitions_of(self._consumer, topic)
        if known is None:
            await self._look_up(topic)
            known = partitions_of(self._consumer, topic) or set()
        wanted = work.headers.get(names.REPLY_PARTITION)
        if wanted is not None and (not wanted.isdigit() or len(wanted) > 9 or int(wanted) not in known):
            text = wanted[:40].decode("latin-1")
            there = f"topic '{topic}' has partitions {sorted(known)[:100]}"
            raise InvalidRequest(f"header '{names.REPLY_PARTITION}' is {text!r}, and {there}")

    async def _look_up(self, topic: str) -> None:
        now = self._loop.time()
        until, why = self._missing.get(topic, (0.0, ""))
        if now >= until:
            try:
                there = await has_topic(self._consumer, topic, _LOOK_UP_S)
                if there:
                    return
                if there is None:
                    raise Unavailable(f"the brokers do not say whether there is a topic '{topic}' for the reply")
                why = "which is not there"
            except TopicAuthorizationFailedError:
                why = "which this server may not use"
            if len(self._missing) >= _MOST:
                self._missing.clear()
            self._missing[topic] = now + _MISSING_S, why
        raise InvalidRequest(f"header '{names.REPLY_TOPIC}' names topic '{topic}', {why}")
