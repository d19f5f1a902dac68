"""What travels beside a request's value: identity, deadline, headers, parameters, cancellation.

One `Context` belongs to one request; a step that has a parameter named `context` gets it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from servinggraph.tracing import Recorder

from servinggraph.sequence import Turn

__all__ = ["Context", "Headers", "Meter", "ParameterValue", "current_context"]

ParameterValue = str | int | float | bool


class Headers(Mapping[str, str]):
    """Request headers (gRPC: metadata) by lower-case name; the last of several equal names wins.

    Built from raw pairs and decoded only when somebody looks, since most steps never do.
    """

    __slots__ = ("__dict__", "_raw")

    def __init__(self, raw: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self._raw = raw

    @cached_property
    def _decoded(self) -> dict[str, str]:
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self._raw}

    def __getitem__(self, name: str) -> str:
        return self._decoded[name.lower()]

    def __iter__(self) -> Any:
        return iter(self._decoded)

    def __len__(self) -> int:
        return len(self._decoded)

    def __repr__(self) -> str:
        return f"Headers({self._decoded!r})"


_NO_HEADERS: Final = Headers()
_unnamed: Final = itertools.count(1)


class Meter(Protocol):
    """Takes what steps count and observe."""

    def count(self, name: str, amount: float) -> None:
        """Add to a counter."""
        ...

    def observe(self, name: str, value: float) -> None:
        """Take one value of a quantity."""
        ...


class Context:
    """Identity, limits and side channel of one request.

    Attributes:
        id: the caller's request id; empty when none was given.
        deadline: moment on the event loop's clock (`loop.time()`, seconds) after which the
            answer is worthless; None without a limit.
        headers: request headers by lower-case name.
        parameters: the request's V2 parameters.
        response_parameters: what steps add here is sent with the answer.
        priority: 1 is served first; 0 takes the batch queue's default level.
        graph: name of the graph that runs.
        route: route that the request's URL names (`/v2/models/{graph}/routes/{route}/infer`); empty for none.
        version: version that the request asks for, of a graph that takes versions apart; empty for none.
        runs_again: True in a batch of several requests that run again one by one if it fails:
            better fail than leave something out of every answer for the sake of one.
        trace: records what happens to this request; None for most.
        arrived: when the request was there to be decoded, by `perf_counter_ns`; 0 where nobody asks.
        run_began: when the graph began with the request, by `perf_counter_ns`; 0 before.
        run_ended: when the graph was done with it; 0 before.
        sent: when its answer could be sent; 0 where nobody asks.
        failure: why the branch before this one failed, in a branch of a `fallback` router; else None.
        meter: takes what `count` and `observe` are given; None where nobody asks for it.
    """

    __slots__ = (
        "_answered",
        "_cancelled",
        "_label",
        "_on_idle",
        "_running",
        "arrived",
        "deadline",
        "failure",
        "graph",
        "headers",
        "id",
        "meter",
        "parameters",
        "priority",
        "response_parameters",
        "route",
        "run_began",
        "run_ended",
        "runs_again",
        "sent",
        "trace",
        "version",
    )

    def __init__(
        self,
        id: str = "",  # the V2 name
        *,
        deadline: float | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
        parameters: Mapping[str, ParameterValue] | None = None,
        priority: int = 0,
        graph: str = "",
        runs_again: bool = False,
    ) -> None:
        self.id = id
        self.deadline = deadline
        self.headers = headers
        self.parameters: Mapping[str, ParameterValue] = {} if parameters is None else parameters
        self.response_parameters: dict[str, ParameterValue] = {}
        self.priority = priority
        self.graph = graph
        self.route = self.version = ""
        self.runs_again = runs_again
        self.trace: Recorder | None = None
        self.arrived = self.run_began = self.run_ended = self.sent = 0
        self.failure: Exception | None = None
        self.meter: Meter | None = None
        self._answered: list[Callable[[], None]] | None = None
        self._label: str | None = None
        self._cancelled = False
        self._running = 0
        self._on_idle: Callable[[], None] | None = None

    @property
    def sequence(self) -> Turn | None:
        """The request's turn in its sequence; None in a graph without `sequences`.

        Raises:
            StepFailed: in a batch of several requests, which has `sequences`.
        """
        return None

    @property
    def sequences(self) -> tuple[Turn, ...]:
        """The turns of all requests of a batch, in order; of a request by itself, its own; empty outside of sequences."""
        return ()

    @property
    def label(self) -> str:
        """What the log calls the request: its id, or a number of its own; of a batch, its requests' labels."""
        if self.id:
            return self.id
        if self._label is None:  # most are never asked
            self._label = f"#{next(_unnamed)}"
        return self._label

    @property
    def cancelled(self) -> bool:
        """True once nobody waits for the answer any more: the caller left, or the time was up.

        For a step in a thread, which cannot be interrupted, to look at between pieces of work.
        """
        return self._cancelled

    def abandon(self) -> None:
        """Note that nobody waits for the answer any more."""
        self._cancelled = True

    @property
    def shadow(self) -> bool:
        """True in a copy of a request that a challenger runs for comparison: nobody gets the answer.

        For a step to look at that has an effect outside of the graph, which would happen twice.
        """
        return False

    def when_answered(self, call: Callable[[], None]) -> None:
        """Call `call` once the graph has run for this request, however that ended."""
        if self._answered is None:
            self._answered = []
        self._answered.append(call)

    def answered(self) -> None:
        """Note that the graph has run; of a stream, that one answer is there."""
        if self._answered is not None:
            calls, self._answered = self._answered, None
            for call in calls:
                call()

    def count(self, name: str, amount: float = 1) -> None:
        """Add to a counter of the step's own.

        Args:
            name: the counter's, a word such as `cache_hits`.
            amount: 0 or more.
        """
        if self.meter is not None:
            self.meter.count(name, amount)

    def observe(self, name: str, value: float) -> None:
        """Hand over one value of a quantity of the step's own, for metrics and for a router that compares its branches by it.

        Args:
            name: the quantity's, a word such as `confidence`.
            value: the value.
        """
        if self.meter is not None:
            self.meter.observe(name, value)

    def metered(self, meter: Meter) -> Context:
        """Return a view of this context with a meter of its own, which hands on to this one's what it wants to."""
        view = _View(self, self.deadline, self.response_parameters)
        view.meter = meter
        return view

    def with_deadline(self, deadline: float) -> Context:
        """Return a view of this context with an earlier deadline; everything else is shared."""
        if self.deadline is not None and self.deadline <= deadline:
            return self
        return _View(self, deadline, self.response_parameters)

    def for_piece(self) -> Context:
        """Return a view for a piece of the request, whose response parameters stand apart."""
        return _View(self, self.deadline, {})

    def in_sequence(self, turn: Turn) -> Context:
        """Return a view for a request's turn in a sequence, with a `when_idle` of its own."""
        return _InSequence(self, turn)

    def apart(self) -> Context:
        """Return a view that tells when the work begun through it has ended, beside the work of the whole request."""
        return _Apart(self, self.deadline, self.response_parameters)

    def begin_work(self) -> None:
        """Note that work has started which cannot be interrupted (a thread, a batch on a device)."""
        self._running += 1

    def end_work(self) -> None:
        """Note that such work has ended; frees the request's slot if its caller has gone meanwhile."""
        self._running -= 1
        if self._running == 0 and self._on_idle is not None:
            on_idle, self._on_idle = self._on_idle, None
            on_idle()

    def when_idle(self, release: Callable[[], None]) -> None:
        """Call `release` once no uninterruptible work of this request runs any more.

        A concurrency slot is thus held until the machine is really free again, not only
        until the caller stopped waiting.
        """
        if self._running == 0:
            release()
        else:
            self._on_idle = release


current_context: Final[ContextVar[Context | None]] = ContextVar("servinggraph_request", default=None)
"""The request that the running code works for, for its log lines; in a batch that of all its requests."""


class _View(Context):
    """A context of which a part differs; its bookkeeping is the original's."""

    __slots__ = ("_whole",)

    def __init__(self, whole: Context, deadline: float | None, response_parameters: dict[str, ParameterValue]) -> None:
        self._whole = whole
        self.id, self.headers, self.parameters = whole.id, whole.headers, whole.parameters
        self.priority, self.graph, self.runs_again = whole.priority, whole.graph, whole.runs_again
        self.trace, self.failure, self.meter = whole.trace, whole.failure, whole.meter
        self.route, self.version = whole.route, whole.version
        self.deadline, self.response_parameters = deadline, response_parameters

    @property
    def sequence(self) -> Turn | None:
        return self._whole.sequence

    @property
    def sequences(self) -> tuple[Turn, ...]:
        return self._whole.sequences

    @property
    def label(self) -> str:
        return self._whole.label

    @property
    def cancelled(self) -> bool:
        return self._whole.cancelled

    def abandon(self) -> None:
        self._whole.abandon()

    @property
    def shadow(self) -> bool:
        return self._whole.shadow

    def when_answered(self, call: Callable[[], None]) -> None:
        self._whole.when_answered(call)

    def answered(self) -> None:
        self._whole.answered()

    def begin_work(self) -> None:
        self._whole.begin_work()

    def end_work(self) -> None:
        self._whole.end_work()

    def when_idle(self, release: Callable[[], None]) -> None:
        self._whole.when_idle(release)


class _InSequence(_View):
    """Counts uninterruptible work itself as well: the sequence's next request waits until it has ended."""

    __slots__ = ("_turn",)

    def __init__(self, whole: Context, turn: Turn) -> None:
        super().__init__(whole, whole.deadline, whole.response_parameters)
        self._turn = turn
        self._running = 0
        self._on_idle = None

    @property
    def sequence(self) -> Turn:
        return self._turn

    @property
    def sequences(self) -> tuple[Turn, ...]:
        return (self._turn,)

    def begin_work(self) -> None:
        Context.begin_work(self)
        self._whole.begin_work()

    def end_work(self) -> None:
        self._whole.end_work()
        Context.end_work(self)

    def when_idle(self, release: Callable[[], None]) -> None:
        Context.when_idle(self, release)


class _Apart(_View):
    """A view whose work is counted by itself as well."""

    __slots__ = ()

    def __init__(self, whole: Context, deadline: float | None, response_parameters: dict[str, ParameterValue]) -> None:
        super().__init__(whole, deadline, response_parameters)
        self._running = 0
        self._on_idle = None

    def begin_work(self) -> None:
        super().begin_work()
        self._running += 1

    def end_work(self) -> None:
        super().end_work()
        Context.end_work(self)

    def when_idle(self, release: Callable[[], None]) -> None:
        Context.when_idle(self, release)
