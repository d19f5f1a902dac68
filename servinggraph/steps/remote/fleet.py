"""Calls one of several servers, goes on to the next where that is safe, and asks those that fail when they are well again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from servinggraph.steps.remote.balancing import Balancer, Ejection, Member
from servinggraph.steps.remote.calls import Call, Transport
from servinggraph.steps.remote.endpoints import Endpoint
from servinggraph.steps.remote.failures import CallFailed, late
from servinggraph.tensors import Array

__all__ = ["Fleet"]

logger = logging.getLogger("servinggraph.steps")


class Fleet:
    """Servers that give the same answers. To be made on the event loop.

    Args:
        node: name of the node, for the log.
        transports: the way to each server.
        policy: when one is left alone.
        hide: takes secrets out of what servers say.
        idempotent: whether a request may run twice: it then goes on to the next server also after it was sent.
    """

    def __init__(
        self,
        node: str,
        transports: Mapping[Endpoint, Transport],
        policy: Ejection,
        hide: Callable[[str], str],
        *,
        idempotent: bool,
    ) -> None:
        self._node = node
        self._hide = hide
        self._transports = transports
        self._balancer = Balancer(list(transports))
        self._policy = policy
        self._idempotent = idempotent
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._timers: dict[Member[Endpoint], asyncio.TimerHandle] = {}
        self._probes: set[asyncio.Task[None]] = set()

    async def infer(self, call: Call, deadline: float | None) -> dict[str, Array]:
        """Run a request.

        Args:
            call: the request; the time that it has left is filled in.
            deadline: when its time is up, on the loop's clock; None without a limit.

        Raises:
            CallFailed: what came of it in the end.
            InvalidRequest: it cannot be sent.
        """
        tried: list[Member[Endpoint]] = []
        last: CallFailed | None = None
        while (member := self._balancer.choose(tried)) is not None:
            tried.append(member)
            try:
                return await self._once(member, call, deadline)
            except CallFailed as failure:
                last = failure
                if failure.sent and not (self._idempotent and failure.unhealthy):
                    break
        assert last is not None  # there is one address at least
        raise last

    async def _once(self, member: Member[Endpoint], call: Call, deadline: float | None) -> dict[str, Array]:
        if deadline is not None:
            left_s = deadline - self._loop.time()
            if left_s <= 0:
                raise CallFailed(late(str(member.value)).error, sent=True, unhealthy=False)
            call = call.within(left_s)
        member.outstanding += 1
        try:
            answer = await self._transports[member.value].infer(call)
        except CallFailed as failure:
            failure.error.message = self._hide(failure.error.message)
            if failure.unhealthy:
                self._failed(member, failure)
            raise
        except asyncio.CancelledError:
            # The executor cancels what is late. A caller who leaves says nothing about the server.
            if deadline is not None and self._loop.time() >= deadline - _TICK_S:
                self._failed(member, late(str(member.value)))
            raise
        finally:
            member.outstanding -= 1
        if member.ejected and (timer := self._timers.pop(member, None)) is not None:
            timer.cancel()  # it was called because all were ejected
        member.worked()
        return answer

    def _failed(self, member: Member[Endpoint], failure: CallFailed) -> None:
        pause = member.failed(self._policy) if len(self._balancer.members) > 1 else None
        if pause is not None:
            logger.warning("node '%s': %s is left alone for %.1f s: %s", self._node, member.value, pause, failure.error.message)
            self._ask_later(member, pause)

    def _ask_later(self, member: Member[Endpoint], pause: float) -> None:
        if self._closed:  # a call that was under way then
            return
        self._timers[member] = self._loop.call_later(pause, self._ask, member)

    def _ask(self, member: Member[Endpoint]) -> None:
        del self._timers[member]
        probe = self._loop.create_task(self._probe(member))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _probe(self, member: Member[Endpoint]) -> None:
        """Ask an address that was left alone whether it is ready."""
        try:
            async with asyncio.timeout(self._policy.probe_timeout_ms / 1e3):
                ready = await self._transports[member.value].ready()
        except (CallFailed, TimeoutError):
            ready = False
        if ready:
            logger.info("node '%s': %s is ready again", self._node, member.value)
            member.admit()
        else:
            self._ask_later(member, member.eject(self._policy))

    async def close(self) -> None:
        """End probes and close connections."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        self._timers.clear()
        for transport in self._transports.values():
            await transport.close()


_TICK_S = 1e-3
"""The event loop's timers may fire this much early."""
