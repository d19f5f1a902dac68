"""Makes the callable of a node: its step or router, wrapped in just what its definition asks for.

All decisions fall here, once; what comes out has no `if` about configuration in it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from time import perf_counter_ns
from typing import Any

import numpy as np

from servinggraph.batching import Batcher
from servinggraph.concurrency import run_until
from servinggraph.context import Context, Meter
from servinggraph.errors import DeadlineExceeded, ServingGraphError, StepFailed
from servinggraph.executor.guarding import guarded
from servinggraph.interfaces import BatchPolicy, Handler, Observer, Operation, Router, RowErrors, Selector, Step
from servinggraph.metrics.steps import metered
from servinggraph.plan import PlanNode
from servinggraph.statistics import NodeStatistics
from servinggraph.tensors import TensorSpec, datatype_of, fits_shape

__all__ = [
    "SlowSteps",
    "as_failure",
    "at_once",
    "counting",
    "limited",
    "mapping_of",
    "observer_operation",
    "output_check",
    "read_only",
    "router_operation",
    "selector_operation",
    "step_operation",
    "unshared",
    "whole_rows",
    "wrapped",
]

logger = logging.getLogger("servinggraph.executor")

SLOW_STEP_NS = 50_000_000
"""An inline step that holds the event loop for longer is reported, once."""


class SlowSteps:
    """Reports an inline step that holds the event loop, once for each.

    Args:
        names: of all nodes; a router is not reported, since the step inside it is.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = names
        self._reported: set[str] = set()

    def report(self, name: str, ns: int) -> None:
        if name in self._reported or any(other.startswith(f"{name}.") for other in self._names):
            return
        self._reported.add(name)
        logger.warning(
            "node '%s' held the event loop for %.0f ms, and every other request waited: "
            "give it 'run: thread' or make it async (reported once)",
            name,
            ns / 1e6,
        )


def counting(step: Step[Any], meter: Meter | None) -> Operation:
    """Return a step's operation; what it counts through its context goes to a meter, where there is one."""
    operation = step.operation()
    return operation if meter is None or not step.counts else metered(operation, meter)


def step_operation(
    node: PlanNode,
    operation: Operation,
    step: Step[Any],
    policy: BatchPolicy | None,
    batchers: dict[str, Batcher],
    statistics: NodeStatistics,
) -> Operation:
    """Return a step's operation, batched if there is a policy; a new batcher joins `batchers` under the node's name."""
    if policy is None:
        return _then(operation, whole_rows) if step.gives_row_errors else operation
    admit = step.admit if type(step).admit is not Step.admit else None
    if not operation.suspends:
        operation = _measured(operation, node.name)
    batcher = Batcher(operation, policy, node.name, admit, statistics)
    batchers[node.name] = batcher
    return batcher.operation()


def router_operation(router: Router[Any], branches: Mapping[str, Handler]) -> Operation:
    """Return a router's operation over the handlers of its branches."""
    route = router.route

    def call(value: Any, context: Context) -> Any:
        # Branches share the value by reference: one that wrote into it would change the others' input.
        return route(read_only(value), context, branches)

    return Operation(call, suspends=True)


def selector_operation(router: Selector[Any], branches: Mapping[str, Operation], loop: asyncio.AbstractEventLoop) -> Operation:
    """Return the operation of a router that only chooses; a plain one where no branch suspends."""
    choose = router.choose
    if not any(branch.suspends for branch in branches.values()):
        calls = {name: branch.call for name, branch in branches.items()}
        return Operation(lambda value, context: calls[choose(value, context)](value, context), suspends=False)
    handlers = {name: branch.call if branch.suspends else at_once(branch, loop) for name, branch in branches.items()}
    return Operation(lambda value, context: handlers[choose(value, context)](value, context), suspends=True)


def observer_operation(router: Observer[Any], branches: Mapping[str, Operation], loop: asyncio.AbstractEventLoop) -> Operation:
    """Return the operation of a router that chooses and sees how it ended; a plain one where no branch suspends."""
    begin, end = router.begin, router.end
    if any(branch.suspends for branch in branches.values()):
        handlers = {name: branch.call if branch.suspends else at_once(branch, loop) for name, branch in branches.items()}
        return Operation(lambda value, context: router.route(value, context, handlers), suspends=True)
    calls = {name: branch.call for name, branch in branches.items()}

    def call(value: Any, context: Context) -> Any:
        branch, context, begun = begin(value, context)
        try:
            answer = calls[branch](value, context)
        except BaseException as error:
            end(begun, error)
            raise
        end(begun, None)
        return answer

    return Operation(call, suspends=False)


def at_once(operation: Operation, loop: asyncio.AbstractEventLoop) -> Handler:
    """Return the handler of a branch that does not suspend: its future is done, so that no router makes it a task."""
    call = operation.call

    def handle(value: Any, context: Context) -> asyncio.Future[Any]:
        try:
            result = call(unshared(value), context)
        except ServingGraphError as error:  # others have become one
            return failed(error)
        future = loop.create_future()
        future.set_result(result)
        return future

    def failed(error: ServingGraphError) -> asyncio.Future[Any]:
        # Not in the frame that the error holds by its traceback: the tensors there would stay until a garbage collection.
        future = loop.create_future()
        future.set_exception(error)
        return future

    return handle


def wrapped(
    node: PlanNode, operation: Operation, statistics: NodeStatistics, keeping: Callable[[Operation], Operation]
) -> Operation:
    """Return the operation with the node's declared outputs, cache, renames, kept tensors and time limit.

    Args:
        node: the node.
        operation: what its step or router does.
        statistics: the node's counters.
        keeping: puts a cache in front of what the node itself does, if it has one.
    """
    if node.outputs is not None:
        operation = _then(operation, _counted(output_check(node.name, node.outputs), statistics))
    if node.guards is not None:
        operation = guarded(operation, node.guards, node.name)
    operation = keeping(operation)
    mapping = mapping_of(node)
    if mapping is not None:
        operation = _mapped(operation, mapping[0], _counted(mapping[1], statistics))
    if node.timeout_s is not None:
        operation = limited(operation, node.timeout_s)
    return operation


def as_failure(error: BaseException, node: str) -> ServingGraphError:
    """Return what a step raised as an error that names the node."""
    if isinstance(error, ServingGraphError):
        return error.at(node)
    return StepFailed.because_of(error).at(node)


def read_only(value: Any) -> Any:
    """Return an array, or a mapping of arrays, as read-only views; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: _locked(array) for name, array in value.items()}
    return _locked(value)


def unshared(value: Any) -> Any:
    """Return what one of several takers of a `read_only` value gets: a mapping is its own to change."""
    return value.copy() if type(value) is dict else value


def _locked(array: Any) -> Any:
    if isinstance(array, np.ndarray) and array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array


def _measured(operation: Operation, name: str) -> Operation:
    """Report a step that holds the event loop while it runs a batch; stretches see only the wait for it."""
    call = operation.call
    report_slow = SlowSteps().report

    def run(value: Any, context: Context) -> Any:
        began = perf_counter_ns()
        result = call(value, context)
        took = perf_counter_ns() - began
        if took > SLOW_STEP_NS:
            report_slow(name, took)
        return result

    return Operation(run, suspends=False)


def _then(operation: Operation, after: Callable[[Any], Any]) -> Operation:
    call = operation.call
    if operation.suspends:

        async def wait(value: Any, context: Context) -> Any:
            return after(await call(value, context))

        return Operation(wait, suspends=True)
    return Operation(lambda value, context: after(call(value, context)), suspends=False)


def whole_rows(result: Any) -> Any:
    """Return a result whose rows are all good; without a batch a bad row is the whole request's failure."""
    if not isinstance(result, RowErrors):
        return result
    if not result.errors:
        return result.outputs
    row, reason = min(result.errors.items(), key=lambda item: item[0])
    raise StepFailed(f"row {row}: {reason}")


def output_check(node: str, declared: Mapping[str, TensorSpec]) -> Callable[[Any], Any]:
    """Return a check that a result has the declared tensors, in datatype and shape."""

    def check(result: Any) -> Any:
        if not isinstance(result, Mapping):
            got = type(result).__name__
            raise StepFailed(f"declares outputs {sorted(declared)}, so it must return a mapping of arrays, got {got}")
        for name, spec in declared.items():
            array = result.get(name)
            if not isinstance(array, np.ndarray | np.generic):
                got = "nothing" if array is None else type(array).__name__
                raise StepFailed(f"output '{name}' must be a numpy array, got {got}")
            datatype = datatype_of(np.asarray(array))
            if spec.datatype is not None and datatype != spec.datatype:
                raise StepFailed(f"output '{name}' has datatype {datatype or array.dtype}, declared is {spec.datatype}")
            if spec.shape is not None and not fits_shape(array.shape, spec.shape):
                raise StepFailed(f"output '{name}' has shape {list(array.shape)}, declared is {list(spec.shape)}")
        return result

    return check


def _counted(after: Callable[..., Any], statistics: NodeStatistics) -> Callable[..., Any]:
    """Return `after`, whose failure makes what the node's batcher has counted as answered a failure."""
    if not statistics.batched:
        return after

    def run(*values: Any) -> Any:
        try:
            return after(*values)
        except BaseException:
            statistics.answer_failed()
            raise

    return run


def mapping_of(node: PlanNode) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]] | None:
    """Return how a node's tensors are renamed on the way in and out, and how the kept ones join the result.

    Returns:
        What makes the node's value of the one that reaches it, and what makes the result of
        both of that and what the node gives; None where a node asks for neither.
    """
    if not node.renamed_inputs and not node.renamed_outputs and node.keep is None:
        return None
    into, out, keep = node.renamed_inputs, node.renamed_outputs, node.keep

    def enter(value: Any) -> Any:
        if keep is not None:
            # Kept tensors go to the node and past it: it must not write into them.
            value = read_only(value)
        if not into:
            return value
        _require_mapping(value, "takes")
        return _renamed(value, into, "inputs", "did not arrive")

    def leave(value: Any, result: Any) -> Any:
        if not out and keep is None:
            return result
        _require_mapping(result, "returns")
        joined = _renamed(result, out, "outputs", "was not given")
        if keep is None:
            return joined
        _require_mapping(value, "keeps tensors of")
        if keep == "all":
            return {**value, **joined}
        for name in keep:
            if name not in value:
                raise StepFailed(f"'keep' names '{name}', which did not arrive: got {sorted(value)}")
            if name in joined:
                raise StepFailed(f"'keep' passes '{name}', but the node gives a tensor of that name; rename one")
            joined[name] = value[name]
        return joined

    return enter, leave


def _mapped(operation: Operation, enter: Callable[[Any], Any], leave: Callable[[Any, Any], Any]) -> Operation:
    call = operation.call
    if operation.suspends:

        async def wait(value: Any, context: Context) -> Any:
            return leave(value, await call(enter(value), context))

        return Operation(wait, suspends=True)
    return Operation(lambda value, context: leave(value, call(enter(value), context)), suspends=False)


def _renamed(tensors: Mapping[str, Any], names: Mapping[str, str], side: str, absent: str) -> dict[str, Any]:
    for old in names:
        if old not in tensors:
            raise StepFailed(f"'rename.{side}' names '{old}', which {absent}: got {sorted(tensors)}")
    renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise StepFailed(f"'rename.{side}' makes two tensors one: got {sorted(tensors)}, renames {dict(names)}")
    return renamed


def _require_mapping(value: Any, what: str) -> None:
    if not isinstance(value, Mapping):
        raise StepFailed(f"{what} a {type(value).__name__}: 'rename' and 'keep' need a mapping of tensor name to array")


def limited(operation: Operation, seconds: float) -> Operation:
    """Return the operation with a time limit."""
    call = operation.call
    loop = asyncio.get_running_loop()
    clock = loop.time
    late = f"took longer than its timeout_ms = {seconds * 1e3:g}"
    if operation.suspends:

        async def wait(value: Any, context: Context) -> Any:
            end = clock() + seconds
            if context.deadline is not None and context.deadline <= end:
                return await call(value, context)  # the request's own limit comes first, and is kept already
            return await run_until(end, loop, call, value, context.with_deadline(end), late)

        return Operation(wait, suspends=True)

    def measure(value: Any, context: Context) -> Any:
        # An inline step cannot be interrupted (`run: thread` can); its late answer is not passed on.
        end = clock() + seconds
        result = call(value, context)
        if clock() > end:
            raise DeadlineExceeded(late)
        return result

    return Operation(measure, suspends=False)
