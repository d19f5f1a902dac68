"""Reads and changes routers while they serve: settings, state that survives a restart, the audit log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

from servinggraph.errors import Conflict, GraphNotFound, InvalidRequest, StepFailed, Unavailable, nearest
from servinggraph.interfaces import Feedback, Router
from servinggraph.lifecycle.audit import AuditLog
from servinggraph.lifecycle.sharing import Sharing
from servinggraph.plan import Plan
from servinggraph.state import StateFailed, StateStore, open_store, revision_of

__all__ = ["Control", "RouterSeat"]

logger = logging.getLogger("servinggraph.control")

SAVE_EVERY_S: Final = 1.0
"""State that moves with every request is saved at most this often, and at the end."""


class RouterSeat:
    """The place of one router: its clock, where its state is kept, and where its changes are noted.

    Attributes:
        router: the router.
        place: graph, version and node.
    """

    def __init__(self, control: Control, place: tuple[str, str, str], router: Router[Any]) -> None:
        self.router = router
        self.place = place
        self._control = control
        self._loop = asyncio.get_running_loop()
        self._store: StateStore | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._saving: asyncio.Task[None] | None = None
        self._sharing: Sharing | None = None
        self._changed: set[str] = set()  # names of settings that were changed here and are not saved yet
        self._told_of: tuple[int, Mapping[str, Any]] | None = None  # a revision that two workers made, and what holds of it
        self._failing = self._stopping = False

    @property
    def key(self) -> str:
        """Name of its state: graph, version and node."""
        return "/".join(self.place)

    def now(self) -> float:
        return self._loop.time()

    def changed(self, who: str, why: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        self.router.revision += 1
        if self.replaced_by is not None:
            logger.info("router '%s' was changed by %s, but another has its place: %s", self.router.name, who, why)
            return
        self._changed.update(after)
        self._control.audit.record(self.place, who, why, before, after, self.router.revision)
        self._save_after(0)

    def keep(self) -> None:
        if self._sharing is None:  # what is shared is exchanged, and this worker's document would undo another's change
            self._save_after(SAVE_EVERY_S)

    @property
    def replaced_by(self) -> RouterSeat | None:
        """The seat that has taken its place and keeps its state; None without one, or where both share it as workers do."""
        return None if self._sharing is not None else self._control.successor(self)

    def _save_after(self, after_s: float) -> None:
        if self._store is None or self._stopping or self.replaced_by is not None:
            return
        if self._timer is not None:
            if after_s:
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(after_s, self._save_soon)

    async def start(self) -> None:
        """Start the router, with what it is to remember.

        Raises:
            StepFailed: its state cannot be read or does not fit.
        """
        place = getattr(self.router.options, "state", None)
        await self.router.start(self)
        if place is None:
            return
        store: StateStore | None = None
        try:
            store = open_store(place, self.router.base)
            remembered = await self._control.remembered(self, store)
            if remembered is not None:
                self._recall(remembered)
            self._control.succeed(self)
            if store.adds_up and self.router.hand_out() is not None:
                sharing = Sharing(self.router, store, self.key, self)
                await sharing.start()
                self._sharing = sharing
            self._store = store
            if self._sharing is None and self._control.takes_over(self):
                self._save_after(0)  # what the other has not saved yet
        except StateFailed as error:
            raise StepFailed(self.router.conceal(str(error))).at(self.router.name) from error
        except InvalidRequest as error:
            text = f"its saved state '{self.key}' does not fit the graph any more: {error.message}; remove it to begin anew"
            raise StepFailed(text).at(self.router.name) from error
        finally:
            if self._store is None:  # it did not start, and nobody is to ask it for its state
                self._control.leave(self)
                if store is not None:
                    store.close()

    def _recall(self, remembered: Any) -> None:
        """Have the router take up what was saved.

        Raises:
            InvalidRequest: it is not what the router gave, or does not fit the graph any more.
        """
        declared = self.router.settings()
        try:
            revision = int(remembered.get("revision", self.router.revision))
            self.router.recall(remembered)
        except (AttributeError, LookupError, TypeError, ValueError, MemoryError) as error:  # it was changed by hand
            raise InvalidRequest(f"{type(error).__name__}: {error}") from error
        self.router.revision = revision
        for name, value in self.router.settings().items():
            if value != declared.get(name):
                logger.info("router '%s': '%s' is %s, as changed while it served", self.router.name, name, value)

    def pass_on(self, record: Feedback) -> bool:
        """Have the workers that share the router's state asked for a request; return False where there are none."""
        if self._sharing is None or type(self.router).knows is Router.knows:
            return False
        return self._sharing.pass_on(record)

    def require_running(self) -> None:
        """Check that what is told to the router now is not lost.

        Raises:
            Unavailable: its graph has left memory, or the server stops.
        """
        if self._stopping:
            graph, _, node = self.place
            text = f"graph '{graph}' is not in memory: router '{node}' listens again once a request has brought it back"
            raise Unavailable(text)

    def take_over(self, before: RouterSeat) -> None:
        """Go on as a router that had left memory: with its settings and what it had learned, and the requests it waits for."""
        if type(before.router) is not type(self.router):
            return
        if self._store is None:  # else it has that from there
            try:
                self._recall(before.document())
            except InvalidRequest as error:
                text = "router '%s' begins anew: what it was before it left memory does not fit any more: %s"
                logger.error(text, self.router.name, error)
                return
        self.router.succeed(before.router)

    async def hand_over(self) -> None:
        """Have the store know all that was learned here, for the one that takes its place and goes by the store."""
        if self._sharing is not None:
            await self._sharing.hand_out()

    def let_go(self) -> None:
        """Have the router end what no caller waits for; it is stopped soon."""
        self.router.let_go()

    async def stop(self) -> None:
        """Stop the router and save what it is to remember."""
        self._stopping = True
        unsaved = self._sharing is None or self._timer is not None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            await self.router.stop()
        finally:
            if self._saving is not None:
                await asyncio.wait({self._saving})
            if self._sharing is not None:
                await self._sharing.stop()
            if self._store is not None:
                if self._control.leave(self) and (unsaved or self._changed or self._failing):
                    await self._save()
                self._store.close()

    @property
    def unsaved(self) -> bool:
        """True while a change is on its way to the store."""
        return self._failing or self._timer is not None or (self._saving is not None and not self._saving.done())

    def save_again(self) -> None:
        """Save what the store has lost."""
        if not self.unsaved:
            self._save_after(0)

    def document(self) -> dict[str, Any]:
        """Return what is saved."""
        return {**self.router.remember(), "revision": self.router.revision}

    def _save_soon(self) -> None:
        self._timer = None
        if self._saving is not None and not self._saving.done():
            self._save_after(SAVE_EVERY_S)  # one at a time: the next one has it all
            return
        self._saving = self._loop.create_task(self._save())

    async def _save(self) -> None:
        """Save what the router is to remember, with what others have changed meanwhile."""
        assert self._store is not None
        if self.replaced_by is not None:
            return
        while True:
            document, changed = self.document(), set(self._changed)
            # Of workers that share a state each saves only its own changes: a document of this revision is another's.
            upto = self.router.revision - (self._sharing is not None)
            try:
                later = await asyncio.to_thread(self._store.save, self.key, document, upto)
            except StateFailed as error:
                self._failed(error)
                return
            # One that has been replaced meanwhile is not another worker: what its successor has saved holds.
            if later is not None and self.replaced_by is None and self._merged(later):
                continue
            break
        if self.router.revision == document["revision"]:
            self._changed -= changed
        if self._failing:
            logger.warning("router '%s' is saved again", self.router.name)
        self._failing = False

    def _failed(self, error: StateFailed) -> None:
        if not self._failing or self._stopping:
            end = "" if self._stopping else "; it is tried again until it can be"
            logger.error("router '%s': %s%s", self.router.name, error, end)
        self._failing = True
        self._save_after(SAVE_EVERY_S)

    def follow(self, saved: Mapping[str, Any]) -> None:
        """Take up settings that were changed in another worker, unless a change of this one is on its way to meet them."""
        if (revision_of(saved) > self.router.revision or not self.unsaved) and self._merged(saved):
            self._save_after(0)

    def _merged(self, saved: Mapping[str, Any]) -> bool:
        """Take up what another worker has saved, but for settings that were changed here since; tell whether to save that."""
        router = self.router
        settings, revision = router.settings(), revision_of(saved)
        differing = {name: saved[name] for name in settings if name in saved and saved[name] != settings[name]}
        if differing.get("resets", settings.get("resets", 0)) < settings.get("resets", 0):
            del differing["resets"]  # what one has forgotten all have
        mine = set() if router.gives_way(saved) else self._changed & differing.keys()
        theirs = {name: value for name, value in differing.items() if name not in mine}
        text = "router '%s' was changed in two workers at once: %s holds, %s"
        if mine:
            logger.warning(text, router.name, "what was changed here", {name: settings[name] for name in mine})
        if theirs and (revision, theirs) != self._told_of:  # what could not be taken up is told once
            if revision == router.revision or self._changed & theirs.keys():
                self._told_of = revision, theirs
                logger.warning(text, router.name, "what the other one has saved", theirs)
            try:
                router.adjust(theirs)
            except InvalidRequest as error:
                logger.error("router '%s' cannot take up settings that were changed in another worker: %s", router.name, error)
        router.revision = revision + bool(mine)
        self._changed &= mine
        return bool(mine) or self._sharing is None


class Control:
    """The routers of all graphs that this process serves.

    Attributes:
        audit: every change.
    """

    def __init__(self, audit: AuditLog | None = None) -> None:
        self.audit = audit or AuditLog()
        # Several seats have one key while a graph is reloaded: the last one is to be asked.
        self._seats: dict[str, list[RouterSeat]] = {}

    def seats_of(self, plan: Plan) -> list[RouterSeat]:
        """Return a seat for each router of a plan, those inside others first; to be started by its executor."""
        return [
            RouterSeat(self, (plan.name, plan.version, node.name), node.work)
            for node in reversed(plan.every_node())
            if isinstance(node.work, Router)
        ]

    async def remembered(self, seat: RouterSeat, store: StateStore) -> dict[str, Any] | None:
        """Return what a starting router takes up: of the one that it replaces, or what was saved."""
        if before := self._seats.get(seat.key):
            await before[-1].hand_over()
        before = self._seats.setdefault(seat.key, [])  # anew: the one before may have left meanwhile
        document = before[-1].document() if before else await asyncio.to_thread(store.load, seat.key)
        before.append(seat)
        return document

    def succeed(self, seat: RouterSeat) -> None:
        """Have a starting router take over from the one that it replaces, if that is of its kind."""
        seats = self._seats[seat.key]
        at = seats.index(seat)
        if at and type(seats[at - 1].router) is type(seat.router):
            seat.router.succeed(seats[at - 1].router)

    def takes_over(self, seat: RouterSeat) -> bool:
        """Tell whether there is another of the same router, which it replaces."""
        return self._seats[seat.key][0] is not seat

    def successor(self, seat: RouterSeat) -> RouterSeat | None:
        """Return the seat that takes another's place, whether it serves already or not yet; None without one."""
        seats = self._seats.get(seat.key, [])
        return seats[-1] if seat in seats and seats[-1] is not seat else None

    def leave(self, seat: RouterSeat) -> bool:
        """Note that a router has stopped; return False when another has taken its place, and its state is that one's."""
        seats = self._seats.get(seat.key, [])
        was_last = bool(seats) and seats[-1] is seat
        if seat in seats:
            seats.remove(seat)
        if not seats:
            self._seats.pop(seat.key, None)
        return was_last

    @staticmethod
    def change(
        seat: RouterSeat, changes: Mapping[str, Any], who: str = "", why: str = "", revision: int | None = None
    ) -> dict[str, Any]:
        """Change settings of a router between two requests.

        Args:
            seat: the router's.
            changes: settings by name, as `settings` gives them.
            who: who asks, for the audit log.
            why: the reason, for the audit log.
            revision: the revision that the changes were made for; None for any.

        Returns:
            All its settings.

        Raises:
            InvalidRequest: a setting that there is not, or a value that it cannot have.
            Conflict: somebody else has changed it meanwhile.
            Unavailable: its graph is not in memory.
        """
        seat.require_running()
        router = seat.router
        if revision is not None and revision != router.revision:
            raise Conflict(f"router '{router.name}' is at revision {router.revision}, not {revision}: read it again")
        before = router.settings()
        unknown = [name for name in changes if name not in before]
        if unknown and before:
            raise InvalidRequest(f"router '{router.name}' has no setting '{unknown[0]}'{nearest(unknown[0], list(before))}")
        successor = seat.replaced_by
        if successor is not None:  # the graph is being loaded anew: what is to serve soon has to have the change, too
            Control.change(successor, changes, who, why)
        router.adjust(changes)
        after = router.settings()
        differing = [name for name in after if after[name] != before.get(name)]
        if differing:
            seat.changed(who or "unknown", why, {n: before.get(n) for n in differing}, {n: after[n] for n in differing})
        return after


def seat_of(seats: Mapping[str, RouterSeat], node: str, graph: str) -> RouterSeat:
    """Return a router's seat by node name.

    Raises:
        GraphNotFound: no such node, or it is no router.
    """
    seat = seats.get(node)
    if seat is None:
        raise GraphNotFound(f"graph '{graph}' has no router '{node}'{nearest(node, list(seats))}")
    return seat
