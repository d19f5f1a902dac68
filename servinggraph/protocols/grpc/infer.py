"""`ModelInfer`: one request, one answer. Everything that every request pays for is in `ModelInfer.answer`."""

from __future__ import annotations

import asyncio
from time import perf_counter_ns
from typing import Any

from servinggraph.context import Context
from servinggraph.errors import ServingGraphError, Unavailable, Unsupported
from servinggraph.lifecycle import infer
from servinggraph.protocols.grpc.feedback import answer_feedback, is_feedback
from servinggraph.protocols.grpc.requests import Found, Requests, failure_of
from servinggraph.protocols.grpc.routing import Call, refuse

__all__ = ["ModelInfer"]


class ModelInfer:
    """Answers calls of one request.

    A call runs in the task that grpc.aio made for it and cancels when the caller has gone, or its
    deadline has passed.

    Args:
        requests: decodes them.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._admission = requests.serving.admission
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def answer(self, data: bytes, call: Call) -> bytes:
        """Answer one call, bytes in and out."""
        requests = self._requests
        task = asyncio.current_task(self._loop)
        assert task is not None  # grpc.aio makes one for each call
        context = Context()
        failure: ServingGraphError | None
        try:
            self._admission.enter()
        except ServingGraphError as error:
            requests.serving.refused("grpc", error)
            return refuse(call, error)
        self._tasks.add(task)
        context.arrived = perf_counter_ns()
        found: Found | None = None
        try:
            message, raw = requests.split(data)
            if is_feedback(message):
                context.arrived = 0  # it is no request to a graph, and counts as none
                return answer_feedback(message, raw, requests.serving)
            found = requests.find(message)
            request = requests.decode(found, message, raw, call, context)
            requests.trace(request, context)
            if request.decoupled:
                raise Unsupported(
                    f"ModelInfer RPC doesn't support models with decoupled transaction policy: '{context.graph}' gives any "
                    "number of answers; use ModelStreamInfer"
                )
            response = await infer(request.graph, request.request, context)
            encoded = requests.encode(response, request)
            requests.succeeded(request, context)
            return encoded
        except (Exception, asyncio.CancelledError) as error:
            failure = failure_of(error, task)
            if failure is None:
                if not requests.closing:
                    requests.cancelled(found, context)
                    raise
                failure = Unavailable("the server is shutting down")
        finally:
            self._tasks.discard(task)
            # Where it was cancelled, the task holds this frame, by the traceback of that: as long as the frame holds the task,
            # all that the request had is there until the next collection.
            del task
            context.when_idle(self._admission.leave)
            if context.trace is not None:  # the bytes go out after this, where nothing can be seen
                context.trace.finish(context.id, "GRPC_SEND_START")
        requests.report(failure, context, found)
        try:
            return refuse(call, failure)
        finally:
            failure = None  # by its traceback it holds this frame, and with it all that the request had

    def cancel(self) -> None:
        """Cancel what is in flight; `Requests.closing` says why."""
        for task in self._tasks:
            task.cancel()
