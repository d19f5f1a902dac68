"""`ModelStreamInfer`: any number of requests over one call, each with any number of answers.

Requests start in the order in which they come. Answers of ordinary graphs go out in that order, those
of decoupled graphs as they come. What is read but not yet answered is bounded by `max_stream_requests`
for each stream, and no answer is made before the one before it was taken: a slow reader slows the
graph and fills no queue. Source: Triton, `ModelStreamInfer` and extension_parameters.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import aclosing
from time import perf_counter_ns
from typing import Any, Final

import grpc

from servinggraph.context import Context
from servinggraph.errors import ServingGraphError, Unavailable
from servinggraph.lifecycle import infer, stream as answers_of
from servinggraph.protocols.grpc.feedback import answer_feedback, is_feedback
from servinggraph.protocols.grpc.requests import Found, Request, Requests, failure_of
from servinggraph.protocols.grpc.routing import Call, abort
from servinggraph.protocols.grpc.status import text_of
from servinggraph.protocols.protobuf.codec import EMPTY_FINAL, empty_answer, error_item, stream_item
from servinggraph.protocols.protobuf.generated import grpc_service_pb2 as pb

__all__ = ["ModelStreamInfer"]

logger = logging.getLogger("servinggraph.grpc")

Item = bytes
Turn = asyncio.Future[None]

_STOPPING: Final = "the server is shutting down"


class ModelStreamInfer:
    """Answers streams.

    Args:
        requests: decodes their requests.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._streams: set[_Stream] = set()
        self._draining = False

    async def answer(self, messages: Any, call: Call) -> None:
        """Answer one stream, until its caller has closed it and everything is answered."""
        stream = _Stream(self._requests, call)
        self._streams.add(stream)
        try:
            if self._draining:
                stream.drain()
            await stream.run()
        finally:
            self._streams.discard(stream)

    def drain(self) -> None:
        """Read no more requests; streams end once what is in flight is answered."""
        self._draining = True
        for stream in self._streams:
            stream.drain()

    def cancel(self) -> None:
        """Cancel what is in flight; `Requests.closing` says why."""
        for stream in self._streams:
            stream.task.cancel()


class _Gone(Exception):
    """An answer could not be written: the caller has gone."""


class _Stream:
    """One stream.

    Attributes:
        task: the task that reads its requests; grpc.aio cancels it when the caller has gone.
    """

    def __init__(self, requests: Requests, call: Call) -> None:
        task = asyncio.current_task()
        assert task is not None  # grpc.aio makes one for each call
        self.task = task
        self._requests = requests
        self._admission = requests.serving.admission
        self._call = call
        self._slots = asyncio.Semaphore(requests.serving.options.max_stream_requests)
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._answering: set[asyncio.Task[None]] = set()
        self._before: asyncio.Future[None] | None = None
        self._errors_end_it = ("triton_grpc_error", "true") in tuple(call.invocation_metadata() or ())
        self._reading = True
        self._end: ServingGraphError | None = None
        self._at_once = False
        self._interruptions = 0

    async def run(self) -> None:
        """Read and answer."""
        try:
            await self._interruptible(self._read())
            self._reading = False
            if not self._at_once:
                await self._interruptible(self._all_answered())
        except asyncio.CancelledError:
            if not self._requests.closing:
                raise
            self._end = Unavailable(_STOPPING)
        finally:
            for task in self._answering:
                task.cancel()
            await self._all_answered()
        if self._end is not None:
            await abort(self._call, self._end)

    def drain(self) -> None:
        """Read no more requests."""
        if self._reading:
            self._interrupt(Unavailable(_STOPPING))

    def _interrupt(self, error: ServingGraphError) -> None:
        """Have the stream end with an error: the task goes on where it waits."""
        self._end = error
        self._interruptions += 1
        self.task.cancel()

    async def _interruptible(self, waiting: Coroutine[Any, Any, None]) -> None:
        """Wait, until that is over or an interruption of our own ends it.

        Raises:
            asyncio.CancelledError: somebody else cancelled the task.
        """
        try:
            await waiting
        except asyncio.CancelledError:
            while self._interruptions:
                self._interruptions -= 1
                self.task.uncancel()
            if self.task.cancelling() or self._end is None:
                raise

    async def _all_answered(self) -> None:
        while self._answering:
            await asyncio.wait(self._answering)

    async def _read(self) -> None:
        """Start the caller's requests one after the other, until it sends no more."""
        while True:
            await self._slots.acquire()
            data = await self._call.read()
            if data is grpc.aio.EOF:
                return
            task = asyncio.create_task(self._start(data))
            self._answering.add(task)
            task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        self._slots.release()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            if not isinstance(error, _Gone):  # a defect of ours
                logger.error("a request of a stream failed: %s", error, exc_info=error)
            self.task.cancel()

    def _start(self, data: bytes) -> Coroutine[Any, Any, None]:
        """Decode a request, and return what answers it."""
        context = Context()
        context.arrived = perf_counter_ns()
        message = pb.ModelInferRequest()
        found: Found | None = None
        request: Request | None = None
        told: bytes | None = None
        failure: ServingGraphError | None = None
        try:
            message, raw = self._requests.split(data)
            if is_feedback(message):
                context.arrived = 0  # it is no request to a graph, and counts as none
                told = answer_feedback(message, raw, self._requests.serving)
            else:
                found = self._requests.find(message)
                request = self._requests.decode(found, message, raw, self._call, context)
        except Exception as error:
            request, failure = None, failure_of(error, self.task)
        if request is not None and request.decoupled:
            return self._answer_all(request, message, context)
        before, self._before = self._before, asyncio.get_running_loop().create_future()
        if told is not None:
            return self._in_turn(stream_item(told, final=True), before, self._before)
        if request is None:
            assert failure is not None  # nobody cancels a task that runs
            return self._refuse(failure, message, context, found, before, self._before)
        return self._answer_one(request, message, context, before, self._before)

    async def _refuse(
        self,
        failure: ServingGraphError,
        message: pb.ModelInferRequest,
        context: Context,
        found: Found | None,
        before: Turn | None,
        turn: Turn,
    ) -> None:
        """Answer a request that no graph has seen; that never ends the stream, as in Triton."""
        self._requests.report(failure, context, found)
        await self._in_turn(error_item(text_of(failure), message), before, turn)

    async def _answer_one(
        self, request: Request, message: pb.ModelInferRequest, context: Context, before: Turn | None, turn: Turn
    ) -> None:
        """Answer a request to an ordinary graph, after those that came before it."""
        try:
            self._admission.enter()
        except ServingGraphError as error:
            await self._refuse(error, message, context, request.found, before, turn)
            return
        self._requests.trace(request, context)
        try:
            response = await infer(request.graph, request.request, context)
            item = stream_item(self._requests.encode(response, request), final=True)
            self._requests.succeeded(request, context)
        except (Exception, asyncio.CancelledError) as error:
            item = self._failed(error, message, context, request.found)
        finally:
            context.when_idle(self._admission.leave)
            if context.trace is not None:
                context.trace.finish(context.id, "GRPC_SEND_START")
        await self._in_turn(item, before, turn)

    async def _in_turn(self, item: Item, before: Turn | None, turn: Turn) -> None:
        try:
            if before is not None and not before.done():
                await asyncio.wait([before])
            await self._write(item)
        finally:
            turn.set_result(None)

    async def _answer_all(self, request: Request, message: pb.ModelInferRequest, context: Context) -> None:
        """Answer a request to a decoupled graph, each answer as it comes."""
        item: Item | None = None
        try:
            self._admission.enter()
        except ServingGraphError as error:
            self._requests.report(error, context, request.found)
            await self._write(error_item(text_of(error), message))
            return
        self._requests.trace(request, context)
        try:
            async with aclosing(answers_of(request.graph, request.request, context)) as answers:
                async for answer in answers:
                    await self._write(stream_item(self._requests.encode(answer, request), final=False))
            if request.request.parameters.get(EMPTY_FINAL):
                item = stream_item(
                    empty_answer(request.request, request.graph.plan.name, request.graph.plan.version), final=True
                )
            self._requests.succeeded(request, context)
        except _Gone:
            self._requests.cancelled(request.found, context)
            raise
        except (Exception, asyncio.CancelledError) as error:
            item = self._failed(error, message, context, request.found)
        finally:
            context.when_idle(self._admission.leave)
            if context.trace is not None:
                context.trace.finish(context.id, "GRPC_SEND_END")
        if item is not None:
            await self._write(item)

    def _failed(self, error: BaseException, message: pb.ModelInferRequest, context: Context, found: Found) -> Item:
        """Return what a request that failed is answered with; the stream's end, where its caller asked for that.

        Raises:
            asyncio.CancelledError: the stream is cancelled.
        """
        task = asyncio.current_task()
        assert task is not None
        failure = failure_of(error, task)
        if failure is None:
            self._requests.cancelled(found, context)
            raise error
        self._requests.report(failure, context, found)
        if self._errors_end_it:
            self._at_once = True
            self._interrupt(failure)
            raise asyncio.CancelledError from error
        return error_item(text_of(failure), message)

    async def _write(self, item: Item) -> None:
        async with self._writing:
            try:
                await self._call.write(item)
            except Exception as error:
                raise _Gone from error
