"""Answers a decoded request: the one way from a front end into a graph.

A front end decodes bytes into an `InferenceRequest` and fills a `Context`; what comes back
it encodes. Everything between is here, so that all front ends behave alike.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import perf_counter_ns

from servinggraph.context import Context, current_context
from servinggraph.errors import ServingGraphError, StepFailed
from servinggraph.lifecycle.catalog import ServedGraph
from servinggraph.lifecycle.profile import PROFILE, Profile, wants_profile
from servinggraph.messages import InferenceRequest, InferenceResponse
from servinggraph.statistics import StreamProgress, code_of
from servinggraph.tracing import Recorder

__all__ = ["infer", "stream"]


async def infer(graph: ServedGraph, request: InferenceRequest, context: Context) -> InferenceResponse:
    """Run one request through a graph.

    Args:
        graph: the graph.
        request: the decoded request, already held against the graph's declared inputs; with a
            `Body` for a graph that takes one, whose answer then is a `Body`.
        context: its identity and limits.

    Raises:
        Unsupported: the graph is decoupled (`graph.plan.decoupled`): use `stream`.
        ServingGraphError: with the node that failed.
    """
    current_context.set(context)
    if graph.door is None:
        graph.requests += 1
    else:
        graph = await graph.door(graph, context)
    plan = graph.plan
    began = perf_counter_ns()
    outputs = None
    profile = Profile(context) if context.parameters and wants_profile(context) else None
    if context.trace is not None:
        context.trace.begin(request.inputs)
    try:
        value = await graph.run(request.inputs, context)
        outputs = graph.finish(value, plan.outputs, plan.answer)
    except ServingGraphError as error:
        if error.__class__ is StepFailed:
            error.at(plan.answer)
        raise
    except Exception as error:  # a defect of ours
        raise StepFailed(f"{type(error).__name__}: {error}").at(plan.answer) from error
    finally:
        graph.leave()
        ended = perf_counter_ns()
        context.run_began, context.run_ended = began, ended
        if outputs is None:
            graph.executor.statistics.requests.failed(ended - began, code_of(sys.exception()))
        else:
            graph.executor.statistics.succeeded(ended, ended - began, request.inputs)
        if context.trace is not None:
            _note_failure(context.trace, sys.exception())
            context.trace.end(outputs)
    if profile is not None:
        context.response_parameters[PROFILE] = profile.text()
    return InferenceResponse(
        plan.name,
        context.version or plan.version,
        outputs,
        request.id,
        context.response_parameters,
        graph.executor.max_rows > 0,
    )


async def stream(graph: ServedGraph, request: InferenceRequest, context: Context) -> AsyncGenerator[InferenceResponse, None]:
    """Run one request through a graph that may give any number of answers; see `infer`.

    The next answer is made when it is asked for, so a slow reader slows the graph and fills no
    queue. Close this (`aclosing`) when the reader has gone: that ends the graph's generators. An
    answer's parameters are those that steps have set for it, or before the first one.
    """
    plan = graph.plan
    if not plan.decoupled:
        yield await infer(graph, request, context)
        return
    current_context.set(context)
    if graph.door is None:
        graph.requests += 1
    else:
        graph = await graph.door(graph, context)
        plan = graph.plan
    progress = StreamProgress(graph.executor.statistics)
    context.run_began = perf_counter_ns()
    if context.trace is not None:
        context.trace.begin(request.inputs)
    try:
        async with aclosing(graph.stream(request.inputs, context)) as values:
            async for value in values:
                outputs = graph.finish(value, plan.outputs, plan.answer)
                progress.answered()
                if context.trace is not None:
                    context.trace.answer(outputs)
                version = context.version or plan.version
                yield InferenceResponse(plan.name, version, outputs, request.id, dict(context.response_parameters))
                progress.asked()
        progress.ended(request.inputs)
    except ServingGraphError as error:
        if error.__class__ is StepFailed:
            error.at(plan.answer)
        raise
    except Exception as error:  # a defect of ours
        raise StepFailed(f"{type(error).__name__}: {error}").at(plan.answer) from error
    finally:
        graph.leave()
        context.run_ended = perf_counter_ns()
        progress.leave()
        if context.trace is not None:
            _note_failure(context.trace, sys.exception())
            context.trace.end(None)


def _note_failure(trace: Recorder, error: BaseException | None) -> None:
    if isinstance(error, ServingGraphError):
        trace.failed(error.code.value, error.message, error.node)
    elif error is not None:
        trace.failed(code_of(error), "the caller left", None)
