"""The contracts that everything plugs into: `Handler`, `Step`, `Router`, and their options.

A third-party step or router subclasses one of these and is found through the registry;
the kernel knows nothing more of it than what stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

from pydantic import Field

from servinggraph.context import Context
from servinggraph.errors import InvalidRequest
from servinggraph.feedback import Feedback, Learned, Receipt
from servinggraph.settings import BatchPolicy, CachePolicy, FrontEndOptions, Options, SequencePolicy
from servinggraph.tensors import Signature, TensorSpec

__all__ = [
    "BatchPolicy",
    "CachePolicy",
    "Feedback",
    "FrontEndOptions",
    "Handler",
    "Learned",
    "NodeSketch",
    "Observer",
    "Operation",
    "Options",
    "Receipt",
    "Router",
    "RouterHost",
    "RouterOptions",
    "RowErrors",
    "Selector",
    "SequencePolicy",
    "Step",
    "Tensors",
]

Handler = Callable[[Any, Context], Awaitable[Any]]
"""The one contract of the kernel: an async callable from (value, context) to a value."""


Tensors = Mapping[str, TensorSpec] | None
"""Tensors known to be on an edge; None when nothing is known of the value there."""

OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True, slots=True)
class Operation:
    """A callable that the executor runs, and whether its result has to be awaited.

    Attributes:
        call: takes (value, context); returns the value, or an awaitable of it.
        suspends: True when the result is an awaitable. A stretch of operations that do
            not suspend is run by plain calls.
        streams: True when `call` returns, at once, an iterator of any number of values: an
            async one with `__anext__` and `aclose` where `suspends`, else a plain one with
            `__next__` and `close`.
    """

    call: Callable[[Any, Context], Any]
    suspends: bool
    streams: bool = False

    @property
    def handler(self) -> Handler:
        """The operation as an async callable."""
        if self.suspends:
            return self.call
        call = self.call

        async def handle(value: Any, context: Context) -> Any:
            return call(value, context)

        return handle


class RowErrors:
    """What a batched step returns when some rows of the batch are bad and the others are fine.

    Args:
        outputs: output tensors for all rows; what stands in a bad row is not looked at.
        errors: row index within the batch to what was wrong with it (text or an exception).
    """

    __slots__ = ("errors", "outputs")

    def __init__(self, outputs: Mapping[str, Any], errors: Mapping[int, str | BaseException]) -> None:
        self.outputs = outputs
        self.errors = errors


@dataclass(frozen=True, slots=True)
class NodeSketch:
    """A node as the Python builder takes it: what YAML would say, not yet checked.

    Attributes:
        role: "step" or "router".
        kind: the kind's name in the registry.
        options: its keys, those that every node has included.
        branches: a router's branches.
    """

    role: Literal["step", "router"]
    kind: str
    options: Mapping[str, Any]
    branches: Mapping[str, NodeSketch | Callable[..., Any]] | None = None


class Step(ABC, Generic[OptionsT]):
    """A kind of node that turns a value into a value.

    Life: constructed and `prepare`d by the compiler (also by `servinggraph check`), then
    `load`ed before the first request, `operation` asked for once, `unload`ed at the end.

    Attributes:
        options_type: pydantic model of the keys that this kind understands in YAML.
        name: the node's name, `score.gbm` for a branch.
        options: the validated options.
        base: folder that relative paths start from.
        gives_row_errors: False when the step never returns `RowErrors`.
        streams: True, from `prepare` on, when it gives any number of values: its operation streams.
        in_sequences: True when the graph declares `sequences`; set before `prepare`.
        keeps_state: True when the step keeps something in `context.sequences`; set by `prepare`.
        counts: False when the step never uses `count` and `observe` of its context; set by `prepare`.
        batches_by_itself: True when `load` may give a policy where the graph is silent about batching.
        unbatchable: why the step cannot be batched, where its tensors do not say so; set by `prepare`.
        declared_outputs: outputs that the definition declares, names as the step gives them; set before `prepare`.
        graph_file: file of a graph that becomes part of this one in the step's place; set by `prepare`.
        conceal: puts `${NAME}` in place of what came from the environment, in a text for people; set before `prepare`.
        passes_on: True when it gives what it gets, as it is.
        sees_requests: True when each request has to reach it by itself, and not joined to others in a batch.
    """

    options_type: ClassVar[type[Options]]
    gives_row_errors: bool = True
    batches_by_itself: ClassVar[bool] = False
    streams: bool = False
    in_sequences: bool = False
    keeps_state: bool = False
    unbatchable: str | None = None
    counts: bool = True
    declared_outputs: Mapping[str, TensorSpec] | None = None
    graph_file: Path | None = None
    conceal: Callable[[str], str] = str
    passes_on: ClassVar[bool] = False
    sees_requests: ClassVar[bool] = False

    def __init__(self, name: str, options: OptionsT, base: Path) -> None:
        self.name = name
        self.options = options
        self.base = base

    @abstractmethod
    def prepare(self) -> Signature:
        """Find what the step needs and say what it takes and gives; no warm-up, no side effects.

        Raises:
            GraphInvalid: with every reason for which this node cannot be served.
        """

    def load(self, batch: BatchPolicy | bool | None) -> BatchPolicy | None:
        """Make ready for requests; called in a worker thread, may take long.

        Args:
            batch: what the graph says of batching; None when it is silent.

        Returns:
            The policy to batch with, or None to run each request alone.
        """
        return BatchPolicy() if batch is True else batch or None

    def unload(self) -> None:
        """Release what `load` took. Called once, also after a `load` that failed."""
        return

    def admit(self, value: Any) -> Any:
        """Check one request's value before it joins a batch, and keep the tensors that are used.

        Raises:
            InvalidRequest: this request must not join; the others go on without it.
        """
        return value

    def impurity(self) -> str | None:
        """Say why equal values may get different answers, as the end of "is not pure: it ..."; None when nothing tells.

        Asked for after `prepare`, for a node that is declared pure: what nothing tells is the declaration's word.
        """
        return None

    @abstractmethod
    def operation(self) -> Operation:
        """Return the callable that runs the step. Called once, on the event loop, after `load`."""

    def files(self) -> Iterable[Path]:
        """Return the files that the step needs beside its code, a model say; asked for after `prepare`."""
        return ()

    def describe(self) -> str:
        """Say in a few words what this is and where it runs, for start-up and `check`."""
        return type(self).__name__


class RouterOptions(Options):
    """What every router understands."""

    state: str | None = Field(
        None,
        description="Where settings that were changed while it served, and what was learned, survive a restart: a path from "
        "this file's folder, or redis://... (6.2 or later), where several processes also follow each other's changes.",
    )


class RouterHost(Protocol):
    """What a router has of the place it runs in."""

    def now(self) -> float:
        """Return the time of the event loop's clock, seconds; tests move it."""
        ...

    def changed(self, who: str, why: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Note a change that the router made by itself: it is saved, and stands in the audit log."""
        ...

    def keep(self) -> None:
        """Have what `remember` gives saved soon; for state that moves with every request."""
        ...


class Router(ABC, Generic[OptionsT]):
    """A kind of node that decides which branches run, and what becomes of their answers.

    Branches are Handlers: a step, another router, anything. `branches` in `signature` and
    `route` has the same names in the same order, so a lookup cannot fail.

    Life: constructed and asked for its `signature` by the compiler, `start`ed on the event
    loop after its branches are loaded, `stop`ped at the end.

    Attributes:
        options_type: pydantic model of the keys that this kind understands in YAML.
        in_sequence: True when each branch gets what the branch before it gives.
        keeps_rows: True when each branch gets the rows that reached the router, all of them: what was joined in
            front of the router needs no queue at a branch.
        decides_by_request: True when parameters, headers or single values of a request decide: requests that
            are joined to a batch before it could not be told apart.
        routes: True when the route in a request's URL decides; set by `signature`.
        versions: versions of the graph that a request may ask for, where they decide; set by `signature`.
        reads: tensors that decide, whether branches take them or not; set by `signature`.
        conceal: puts `${NAME}` in place of what came from the environment, in a text for people; set before `signature`.
        detached: True when a branch may run although its request was answered, and so outside of its sequence.
        repeats: True when a branch may run several times for a request, and so at no one place in its sequence.
        name: the node's name.
        options: the validated options.
        base: folder that relative paths start from.
        host: the place it runs in, from `start` on.
        revision: counts the changes of its settings.
    """

    options_type: ClassVar[type[Options]]
    in_sequence: ClassVar[bool] = False
    keeps_rows: ClassVar[bool] = False
    decides_by_request: ClassVar[bool] = False
    routes: bool = False
    versions: Collection[str] = ()
    reads: Collection[str] = ()
    conceal: Callable[[str], str] = str
    detached: ClassVar[bool] = False
    repeats: ClassVar[bool] = False

    def __init__(self, name: str, options: OptionsT, base: Path) -> None:
        self.name = name
        self.options = options
        self.base = base
        self.host: RouterHost | None = None
        self.revision = 0

    @classmethod
    def reaching(cls, branch: str, options: Mapping[str, Any], given: Tensors, before: Mapping[str, Signature]) -> Tensors:
        """Return the tensors that reach a branch, as far as known; asked for by the compiler before there is a router.

        Args:
            branch: its name.
            options: the router's keys, not yet checked.
            given: tensors that reach the router; None when nothing is known of them.
            before: the branches before it, with what they take and give.
        """
        del branch, options  # for routers that tell their branches apart
        return list(before.values())[-1].outputs if cls.in_sequence and before else given

    @abstractmethod
    def signature(self, branches: Mapping[str, Signature]) -> Signature:
        """Check options and branches against each other; say what the node takes and gives.

        Raises:
            GraphInvalid: with every reason for which this router cannot work.
        """

    def impurity(self) -> str | None:
        """Say why equal values may get different answers although the branches are pure; see `Step.impurity`.

        A router whose branches all run, or that decides by the value alone, overrides this.
        """
        return "may decide differently for each request"

    @abstractmethod
    async def route(self, value: Any, context: Context, branches: Mapping[str, Handler]) -> Any:
        """Answer one request."""

    def describe(self) -> str:
        """Say in a few words what this router does, for start-up and `check`."""
        return type(self).__name__

    async def start(self, host: RouterHost) -> None:
        """Begin: called on the event loop before the first request. What it begins, `stop` ends."""
        self.host = host

    def let_go(self) -> None:
        """Cancel what runs and no caller waits for, so that it holds up nobody; `stop` follows once all batches have ended."""
        return

    async def stop(self) -> None:
        """End what `start` began. Called once, also after a `start` that failed."""

    def settings(self) -> dict[str, Any]:
        """Return what can be changed while it serves, as plain values: weights, a stage, who is champion."""
        return {}

    def adjust(self, changes: Mapping[str, Any]) -> None:
        """Change settings, all or none, between two requests: no await, so no request sees half of it.

        Raises:
            InvalidRequest: an unknown setting, or a value that it cannot have.
        """
        raise InvalidRequest(f"router '{self.name}' has no settings that can be changed")

    def report(self) -> dict[str, Any]:
        """Return what it has seen, as plain values: decisions by branch, rewards, agreement."""
        return {}

    def remember(self) -> dict[str, Any]:
        """Return what has to survive a restart, as plain values; `settings` unless there is more."""
        return self.settings()

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """Take up what `remember` gave before a restart.

        Args:
            remembered: with the `revision` of then. At 0 nobody had changed a setting, and those of the definition hold,
                which may have been edited meanwhile.

        Raises:
            InvalidRequest: it does not fit the graph any more.
        """
        if remembered.get("revision", 1):
            self.adjust(remembered)

    def succeed(self, before: Self) -> None:
        """Take over what is not saved, the requests that wait for feedback say, from the router that this one replaces.

        Called after `recall`, where a graph is loaded anew while it serves; `before` still answers what it has begun.
        """

    def hand_out(self) -> Learned | None:
        """Return what was learned since this was last asked, to be added to what others learn.

        Workers of which this returns something follow each other's changes of settings as well; by default they do so
        where there are settings, and learn nothing. None where they share nothing.
        """
        return Learned(0, {}) if self.settings() else None

    def take_in(self, everyone: Learned) -> None:
        """Know what all workers have learned, what was handed out here included, beside what came here since then."""

    def knows(self, id: str) -> bool:
        """Tell whether it remembers a request, for feedback that came to another worker; False for all by default."""
        return False

    def gives_way(self, saved: Mapping[str, Any]) -> bool:
        """Tell whether what another worker has saved holds, of two changes of a setting that neither knew of.

        By default the one that was saved later does.
        """
        return False

    def feedback(self, record: Feedback) -> Receipt:
        """Take the outcome of an earlier request, and say what became of it.

        Raises:
            InvalidRequest: this router would use it, but it cannot be.
        """
        return Receipt.UNUSED


class Selector(Router[OptionsT]):
    """A kind of router of which one branch answers each request, and whose own work ends when it has chosen it.

    It costs a plain call: where no branch suspends neither does the router.
    """

    @abstractmethod
    def choose(self, value: Any, context: Context) -> str:
        """Return the name of the branch that answers a request.

        Raises:
            ServingGraphError: none does.
        """

    async def route(self, value: Any, context: Context, branches: Mapping[str, Handler]) -> Any:
        return await branches[self.choose(value, context)](value, context)


class Observer(Router[OptionsT]):
    """A kind of router of which one branch answers each request, and that sees how it ended; it costs plain calls, too."""

    @abstractmethod
    def begin(self, value: Any, context: Context) -> tuple[str, Context, Any]:
        """Return the name of the branch that answers a request, the context it gets, and what `end` is to be given.

        Raises:
            ServingGraphError: none does; then `end` is not called.
        """

    @abstractmethod
    def end(self, begun: Any, error: BaseException | None) -> None:
        """See how a request ended.

        Args:
            begun: what `begin` gave last.
            error: what the branch raised; None when it answered.
        """

    async def route(self, value: Any, context: Context, branches: Mapping[str, Handler]) -> Any:
        branch, context, begun = self.begin(value, context)
        try:
            answer = await branches[branch](value, context)
        except BaseException as error:
            self.end(begun, error)
            raise
        self.end(begun, None)
        return answer
