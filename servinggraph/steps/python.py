"""The `python` step: a function, or a class with state, is a node."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from servinggraph.concurrency import GeneratorInThreads, WorkerThreads
from servinggraph.context import Context
from servinggraph.errors import GraphInvalid, InvalidRequest, Problem, StepFailed
from servinggraph.importing import ImportProblem, load_object
from servinggraph.interfaces import BatchPolicy, Operation, Options, Step
from servinggraph.steps.state import check_one_row, with_state
from servinggraph.tensors import Signature, TensorSpec

__all__ = ["Python", "PythonOptions"]


class PythonOptions(Options):
    """A Python function or class."""

    call: str | Callable[..., Any] = Field(description="What to call: 'package.module:name' of a function or class.")
    init: dict[str, Any] = Field(default_factory=dict, description="Arguments for a class, by name.")
    run: Literal["inline", "thread"] = Field(
        "inline", description="Where a plain function runs: on the event loop, or in a thread because it blocks."
    )
    threads: int = Field(4, ge=1, le=256, description="Threads for `run: thread`; with `batch`, its `instances`.")


class Python(Step[PythonOptions]):
    """Calls a function, sync or async.

    One parameter gets the whole value, several get tensors by name, one called `context` gets
    the context. In a graph with `sequences` one called `state` gets a dict that is kept for the
    sequence, in a batched node a list with one for each row.

    A class is constructed with `init`, its `load` is called before the first request and its
    `unload` after the last; requests go to `__call__`, or else to `infer`.
    A generator, sync or async, gives any number of values, one after the other: it streams.
    """

    options_type = PythonOptions

    def prepare(self) -> Signature:
        target = self.options.call
        try:
            self._target = load_object(target, self.base) if isinstance(target, str) else target
        except ImportProblem as error:
            raise GraphInvalid([Problem(str(error), node="call")]) from error
        self._is_class = inspect.isclass(self._target)
        label = target if isinstance(target, str) else getattr(target, "__qualname__", repr(target))
        self._label = label
        function = self._function_of(self._target)
        if function is None:
            what = "a class with neither '__call__' nor 'infer'" if self._is_class else "not callable"
            raise GraphInvalid([Problem(f"'{label}' is {what}", node="call")])
        if self._is_class:
            self._check_init(label)
        elif self.options.init:
            raise GraphInvalid([Problem(f"'init' is for classes, and '{label}' is a function", node="init")])
        self._inspect(function, label)
        if self._is_async and self.options.run == "thread":
            raise GraphInvalid([Problem(f"'run: thread' is for blocking functions, and '{label}' is async", node="run")])
        return Signature(self._inputs, _declared(self._target, "outputs"))

    def load(self, batch: BatchPolicy | bool | None) -> BatchPolicy | None:
        policy = super().load(batch)
        self._batched = policy is not None
        self._instance: Any = None
        self._threads: WorkerThreads | None = None
        if self._is_class:
            self._instance = self._target(**self.options.init)
            _call_optional(self._instance, "load", self.name)
        if self.options.run == "thread":
            self._threads = WorkerThreads(policy.instances if policy else self.options.threads, self.name)
            self._threads.start()
        return policy

    def unload(self) -> None:
        threads, instance = getattr(self, "_threads", None), getattr(self, "_instance", None)
        if threads is not None:
            threads.stop()
        if instance is not None:
            _call_optional(instance, "unload", self.name)
        self._threads = self._instance = None

    def admit(self, value: Any) -> Any:
        """Pick the tensors that the function names, and insist on arrays: only they have rows."""
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"is batched, so it takes a mapping of tensor name to array, got {type(value).__name__}")
        if self._inputs is not None:
            value = {name: value[name] for name, spec in self._required(value).items() if name in value or not spec.optional}
        for name, array in value.items():
            if not isinstance(array, np.ndarray):
                raise InvalidRequest(f"is batched, so tensor '{name}' must be a numpy array, got {type(array).__name__}")
        if self.keeps_state:
            check_one_row(value, self.name)
        return value

    def operation(self) -> Operation:
        function = self._function_of(self._target) if self._instance is None else self._bound(self._instance)
        assert function is not None  # prepare has seen to it
        call = self._adapted(function) if not self.keeps_state else self._stateful(function)
        if self._threads is not None:
            threads = self._threads

            if self.streams:  # to call a generator function runs nothing of it yet

                def begin(value: Any, context: Context) -> Any:
                    return GeneratorInThreads(threads, call(value, context), context)

                return Operation(begin, suspends=True, streams=True)

            def in_thread(value: Any, context: Context) -> Any:
                return threads.call(call, value, context)

            return Operation(in_thread, suspends=True)
        return Operation(call, suspends=self._is_async, streams=self.streams)

    def impurity(self) -> str | None:
        return "takes the context, which differs between requests" if self._context_by_name else None

    def describe(self) -> str:
        where = "async" if self._is_async else self.options.run
        return f"python {self._label} ({where}{', stream' if self.streams else ''})"

    def _function_of(self, target: Any) -> Callable[..., Any] | None:
        """Return the function that requests go to; of a class, unbound."""
        if not self._is_class:
            return target if callable(target) else None
        own_call = next((cls.__dict__["__call__"] for cls in target.__mro__ if "__call__" in cls.__dict__), None)
        found = own_call or getattr(target, "infer", None)
        return found if callable(found) else None

    def _bound(self, instance: Any) -> Callable[..., Any]:
        return instance if "__call__" in dir(type(instance)) else instance.infer  # type: ignore[no-any-return]

    def _check_init(self, label: str) -> None:
        try:
            inspect.signature(self._target).bind(**self.options.init)
        except TypeError as error:
            raise GraphInvalid([Problem(f"'init' does not fit '{label}': {error}", node="init")]) from error
        except ValueError:
            return  # a class from C without a signature: found out when it is constructed

    def _inspect(self, function: Callable[..., Any], label: str) -> None:
        """Find out once what the function takes, whether it is async, and whether it is a generator."""
        plain = getattr(function, "__call__", function) if not inspect.isroutine(function) else function  # noqa: B004
        streams_async = inspect.isasyncgenfunction(function) or inspect.isasyncgenfunction(plain)
        self.streams = streams_async or inspect.isgeneratorfunction(function) or inspect.isgeneratorfunction(plain)
        self._is_async = streams_async or inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(plain)
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except ValueError:  # a builtin or C function without a signature takes the value
            parameters = [inspect.Parameter("value", inspect.Parameter.POSITIONAL_ONLY)]
        if self._is_class:
            parameters = parameters[1:]  # self
        kinds = inspect.Parameter
        named = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        self._context_at = next((i for i, p in enumerate(named) if p.name == "context"), None)
        self.keeps_state = self.in_sequences and any(p.name == "state" for p in named)
        others = {"context", "state"} if self.keeps_state else {"context"}
        tensors = [p for p in named if p.name not in others]
        self._takes_all = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
        self._inputs: dict[str, TensorSpec] | None = None
        self._takes_nothing = (
            not tensors and not self._takes_all and not any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
        )
        # A second parameter with a default is a setting of the function's own, not a tensor.
        required = [p for p in tensors if p.default is kinds.empty]
        self._by_name = len(required) > 1 or (self._takes_all and len(tensors) > 0)
        if self._by_name:
            declared = _declared(function, "inputs") or _declared(self._target, "inputs") or {}
            self._inputs = {p.name: declared.get(p.name, TensorSpec(optional=p.default is not kinds.empty)) for p in tensors}
            if any(p.kind is kinds.POSITIONAL_ONLY for p in tensors):
                raise GraphInvalid([Problem(f"'{label}' has positional-only parameters: tensors go in by name", node="call")])
        else:
            self._inputs = _declared(self._target, "inputs")
        if self.keeps_state and any(p.kind in (kinds.POSITIONAL_ONLY, kinds.VAR_POSITIONAL) for p in parameters):
            text = f"'{label}' takes 'state', so all its parameters must have names: it has '*' or positional-only ones"
            raise GraphInvalid([Problem(text, node="call")])
        self._value_name = tensors[0].name if tensors else ""
        self._context_by_name = any(p.name == "context" for p in named)
        self.counts = self._context_by_name

    def _required(self, value: Mapping[str, Any]) -> dict[str, TensorSpec]:
        assert self._inputs is not None
        missing = [name for name, spec in self._inputs.items() if name not in value and not spec.optional]
        if missing:
            raise InvalidRequest(f"takes tensor {', '.join(map(repr, missing))}, but got {sorted(value)}")
        return self._inputs

    def _adapted(self, function: Callable[..., Any]) -> Callable[[Any, Context], Any]:
        """Return the function as a callable of (value, context), built for its parameters."""
        if not self._by_name:
            if self._takes_nothing:
                if self._context_by_name:
                    return lambda value, context: function(context=context)
                return lambda value, context: function()
            if self._takes_all and self._context_by_name:
                return lambda value, context: function(**value, context=context)
            if self._takes_all:
                return lambda value, context: function(**value)
            if self._context_by_name:
                if self._context_at == 0:
                    return lambda value, context: function(context, value)
                return lambda value, context: function(value, context=context)
            return lambda value, context: function(value)
        assert self._inputs is not None
        required = tuple(name for name, spec in self._inputs.items() if not spec.optional)
        optional = tuple(name for name, spec in self._inputs.items() if spec.optional)
        wants_context, takes_all = self._context_by_name, self._takes_all

        def call(value: Any, context: Context) -> Any:
            try:
                arguments = dict(value) if takes_all else {name: value[name] for name in required}
            except (KeyError, TypeError, ValueError):
                raise StepFailed(_missing(required, value)) from None
            for name in optional:
                if name in value:
                    arguments[name] = value[name]
            if wants_context:
                arguments["context"] = context
            return function(**arguments)

        return call

    def _stateful(self, function: Callable[..., Any]) -> Callable[[Any, Context], Any]:
        """Return the same for a function with a parameter `state`; all others go in by name, too."""
        name = self._value_name
        if self._by_name or self._takes_all or self._takes_nothing:
            arguments = self._adapted(dict)
        elif self._context_by_name:
            arguments = lambda value, context: {name: value, "context": context}  # noqa: E731
        else:
            arguments = lambda value, context: {name: value}  # noqa: E731
        return with_state(function, arguments, self.name, batched=self._batched, is_async=self._is_async, streams=self.streams)


def _missing(required: tuple[str, ...], value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"takes tensors {', '.join(required)} by name, but got a {type(value).__name__}"
    return f"takes tensors {', '.join(required)}, but got {', '.join(map(str, value)) or 'none'}"


def _declared(target: Any, side: str) -> dict[str, TensorSpec] | None:
    """Return the tensors that the `signature` decorator, or a class attribute, declares."""
    declared = getattr(target, f"__servinggraph_{side}__", None)
    if declared is None and inspect.isclass(target):
        declared = getattr(target, side, None)
        declared = declared if isinstance(declared, Mapping) else None
    if declared is None:
        return None
    try:
        return {name: TensorSpec(datatype, tuple(shape)) for name, (datatype, shape) in declared.items()}
    except (TypeError, ValueError) as error:
        text = f"its declared {side} must map a tensor name to (datatype, shape), got {declared!r}"
        raise GraphInvalid([Problem(text, node="call")]) from error


def _call_optional(instance: Any, method: str, node: str) -> None:
    function = getattr(instance, method, None)
    if not callable(function):
        return
    if isinstance(result := function(), Awaitable):
        if inspect.iscoroutine(result):
            result.close()
        raise StepFailed(f"'{method}' is async; it runs in a thread before the first request, so make it plain").at(node)
