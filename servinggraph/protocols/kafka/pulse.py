"""Notices that this process stood still: a machine that was paused, a step that held the event loop."""

from __future__ import annotations

import asyncio
from typing import Final

__all__ = ["Dropped", "Fenced", "Pulse"]

_BEAT_S: Final = 0.25


class Fenced(Exception):
    """This member was not heard of for so long that its partitions may belong to another by now."""


class Dropped(Fenced):
    """A member with a name is not in its group any more.

    Args:
        member: its name.
    """

    def __init__(self, member: str) -> None:
        super().__init__(
            f"the group dropped member '{member}': another one has joined as 'input.member: {member}', where each replica "
            "needs a name of its own (${HOSTNAME}), or nothing was heard of this one for 'input.session_timeout_ms'"
        )


class Pulse:
    """Beats while the event loop runs.

    aiokafka learns that it has lost its partitions from the broker's next answer; until then a process that
    wakes up would go on writing what it had.

    Args:
        longest_s: standstill after which the group has given the partitions away, seconds.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._loop = asyncio.get_running_loop()
        self._beat = self._loop.time()

    async def run(self) -> None:
        """Beat.

        Raises:
            Fenced: it stood still.
        """
        while True:
            self.check()
            self._beat = self._loop.time()
            await asyncio.sleep(_BEAT_S)

    def check(self) -> None:
        """Look at it before something is written: what runs first after a standstill may be that.

        Raises:
            Fenced: it stood still.
        """
        still = self._loop.time() - self._beat
        if still > self._longest_s:
            raise Fenced(f"this process stood still for {still:.1f} s: its group has given its partitions away")
