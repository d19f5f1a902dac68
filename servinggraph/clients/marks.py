"""Which records of a partition were dealt with, as a consumer group can keep it: an offset, and metadata for what lies beyond.

All records before the offset are done; of those from it on the metadata has one bit each, packed.
"""

from __future__ import annotations

import asyncio
import base64
import zlib
from collections.abc import Sequence
from typing import Final

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from servinggraph.clients.topics import failure_text
from servinggraph.errors import LimitExceeded, Unavailable
from servinggraph.kafka import ConnectionOptions

__all__ = ["Marks", "read_marks"]

_FORM: Final = "bits1:"
_LONGEST: Final = 4000
"""Brokers keep 4096 bytes of metadata by default (offset.metadata.max.bytes)."""
_UNPACKED: Final = 2**24
_ATTEMPTS: Final = 40
_PAUSE_S: Final = 0.25


class Marks:
    """The records of one partition that were dealt with.

    Args:
        low: all before it are done.
        beyond: done from there on.

    Attributes:
        low: all before it are done.
    """

    def __init__(self, low: int = 0, beyond: Sequence[int] = ()) -> None:
        self.low = low
        self._beyond = set(beyond)
        self._held = False

    @classmethod
    def of(cls, offset: int, metadata: str) -> Marks:
        """Return what `note` gave.

        Raises:
            Unavailable: the metadata is somebody else's.
        """
        if not metadata:
            return cls(offset)
        try:
            if not metadata.startswith(_FORM):
                raise ValueError(metadata)
            packed = base64.b85decode(metadata.removeprefix(_FORM))
            bits = zlib.decompressobj().decompress(packed, _UNPACKED)
        except (ValueError, zlib.error):
            raise Unavailable(f"the group's notes are not a replay's: {metadata[:40]!r}; choose another group") from None
        return cls(
            offset, [offset + 8 * at + bit for at, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1]
        )

    def start(self, first: int) -> None:
        """Take note of the first record that is still there."""
        self.low = max(self.low, first)

    def has(self, offset: int) -> bool:
        """Tell whether a record is done."""
        return offset < self.low or offset in self._beyond

    def pass_by(self, offset: int, *, done: bool) -> None:
        """Note of the next record whether it is done."""
        if done and self._held:
            self._beyond.add(offset)
        elif not self._held:
            self.low = offset + 1 if done else offset
            self._held = not done

    def note(self) -> tuple[int, str]:
        """Return offset and metadata to commit.

        Raises:
            LimitExceeded: the metadata would be longer than brokers keep.
        """
        self._beyond = {offset for offset in self._beyond if offset >= self.low}
        if not self._beyond:
            return self.low, ""
        bits = bytearray((max(self._beyond) - self.low) // 8 + 1)
        for offset in self._beyond:
            bits[(offset - self.low) // 8] |= 1 << (offset - self.low) % 8
        text = _FORM + base64.b85encode(zlib.compress(bytes(bits), 9)).decode()
        if len(text) > _LONGEST:
            raise LimitExceeded(
                f"the records from offset {self.low} on that are done and those that are not alternate more often than can be "
                "noted: do those that are left first, without a selection, or give another group"
            )
        return self.low, text


async def read_marks(
    connection: ConnectionOptions, group: str, places: Sequence[TopicPartition]
) -> dict[TopicPartition, Marks]:
    """Return what a group has noted of partitions; of those of which it has not, empty marks.

    Raises:
        Unavailable: the group's coordinator cannot be reached, or its notes are not a replay's.
    """
    admin = AIOKafkaAdminClient(**connection.client_settings())
    try:
        await admin.start()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                found = await admin.list_consumer_group_offsets(group, partitions=list(places))
                break
            except KafkaError as error:
                # A cluster that has just begun has no coordinator yet.
                if not error.retriable or attempt == _ATTEMPTS:
                    raise Unavailable(f"what group '{group}' has noted cannot be read: {failure_text(error)}") from error
                await asyncio.sleep(_PAUSE_S)
    finally:
        await admin.close()
    return {
        place: Marks.of(found[place].offset, found[place].metadata or "")
        if place in found and found[place].offset >= 0
        else Marks()
        for place in places
    }
