"""Sequences through the mock server, on the manual clock."""

import asyncio
import contextlib
import random
import threading

import numpy as np
import pytest

from servinggraph import Context, Graph, InvalidRequest, routers
from servinggraph.errors import Cancelled, DeadlineExceeded, GraphInvalid, StepFailed, Unavailable
from servinggraph.lifecycle import Catalog, infer, stream
from servinggraph.messages import InferenceRequest

X = {"x": ("FP32", [-1])}


def total(value, state):
    state["sum"] = state.get("sum", 0) + float(value["x"][0])
    return {"y": np.array([state["sum"]])}


def graph_of(step=total, sequences=None, graph=None, **options):
    graph = Graph("g", X, sequences=sequences or {}, **(graph or {}))
    graph.to(step, "step", **options).respond()
    return graph


async def send(server, key, x, timeout_s=None, **flags):
    parameters = {"sequence_id": key, **{f"sequence_{name}": flag for name, flag in flags.items()}}
    reply = await server.infer(x=[x], parameters=parameters, timeout_s=timeout_s)
    return reply.outputs["y"].tolist()[0]


class Held:
    """A running total whose requests wait until they are let go; knows in which order they began."""

    def __init__(self):
        self.began = []
        self._gates = {}

    async def __call__(self, value, state, context: Context):
        x = float(value["x"][0])
        self.began.append((context.sequence.id, x))
        await self._gates.setdefault(x, asyncio.Event()).wait()
        if x < 0:
            raise InvalidRequest("negative")
        return total(value, state)

    def let_go(self, *xs):
        for x in xs:
            self._gates.setdefault(x, asyncio.Event()).set()


def soon(awaitable):
    return asyncio.ensure_future(awaitable)


def test_state_is_kept_from_request_to_request(run):
    async def check():
        async with graph_of().mock() as server:
            assert [1, 3, 6] == [
                await send(server, 7, 1, start=True),
                await send(server, 7, 2),
                await send(server, 7, 3, end=True),
            ]
            with pytest.raises(InvalidRequest, match="must specify the START flag"):
                await send(server, 7, 1)

    run(check())


def test_200_interleaved_sequences_of_50_steps_keep_state_and_order(run, manual_clock):
    """All 50 requests of a sequence are under way at once, and each takes a random time."""
    delays = random.Random(5)
    seen = {}

    async def step(value, state, context):
        seen.setdefault(context.sequence.id, []).append(int(value["x"][0]))
        await asyncio.sleep(delays.random() / 100)
        return total(value, state)

    async def sequence(server, key):
        await asyncio.sleep(delays.random())
        requests = []
        for n in range(50):
            requests.append(soon(send(server, key, n, start=n == 0, end=n == 49)))
            if delays.random() < 0.2:
                await asyncio.sleep(delays.random() / 100)
        return await asyncio.gather(*requests)

    async def check():
        async with graph_of(step).mock(max_in_flight=20_000) as server:
            ids = [key for n in range(1, 101) for key in (n, str(n))]
            everything = soon(asyncio.gather(*(sequence(server, key) for key in ids)))
            while not everything.done():
                await manual_clock.advance(0.05)
            sums = np.cumsum(np.arange(50)).tolist()
            assert [sums] * 200 == everything.result()
            assert {key: list(range(50)) for key in ids} == seen

    run(check())


def test_different_sequences_run_side_by_side_and_one_sequence_in_order(run, manual_clock):
    async def check():
        held = Held()
        async with graph_of(held.__call__).mock() as server:
            requests = [
                soon(send(server, *what, **flags))
                for what, flags in [((1, 1), {"start": True}), ((1, 2), {}), ((2, 3), {"start": True}), ((1, 4), {"end": True})]
            ]
            await manual_clock.settle()
            assert [(1, 1), (2, 3)] == held.began
            held.let_go(2, 4)
            await manual_clock.settle()
            assert 2 == len(held.began)
            held.let_go(1, 3)
            assert [1, 3, 3, 7] == await asyncio.gather(*requests)
            assert [(1, 1), (2, 3), (1, 2), (1, 4)] == held.began

    run(check())


def test_an_idle_sequence_is_freed(run, manual_clock):
    async def check():
        async with graph_of(sequences={"idle_ms": 500}).mock() as server:
            assert 1 == await send(server, 7, 1, start=True)
            await manual_clock.advance(0.499)
            assert 3 == await send(server, 7, 2)
            await manual_clock.advance(0.501)
            with pytest.raises(
                InvalidRequest, match="inference request for sequence 7 to model 'g' must specify the START flag"
            ):
                await send(server, 7, 1)

    run(check())


def test_flags_come_back_as_response_parameters(run):
    async def check():
        async with graph_of().mock() as server:
            reply = await server.infer(x=[1], parameters={"sequence_id": 2**64 - 1, "sequence_start": True})
            assert {"sequence_id": 2**64 - 1, "sequence_start": True, "sequence_end": False} == reply.parameters
            reply = await server.infer(x=[1], parameters={"sequence_id": "abc", "sequence_start": True, "sequence_end": True})
            assert {"sequence_id": "abc", "sequence_start": True, "sequence_end": True} == reply.parameters

    run(check())


@pytest.mark.parametrize("id", [None, 0, ""])
def test_a_request_without_a_sequence_is_refused(run, id):
    async def check():
        async with graph_of().mock() as server:
            parameters = {"sequence_start": True} | ({} if id is None else {"sequence_id": id})
            with pytest.raises(InvalidRequest, match="model 'g' must specify a non-zero or non-empty correlation ID"):
                await server.infer(x=[1], parameters=parameters)

    run(check())


@pytest.mark.parametrize(
    "parameters, reason",
    [
        ({"sequence_id": -1}, "'sequence_id' is a number from 0 to 2.64-1, got -1"),
        ({"sequence_id": 1.0}, "'sequence_id' is a whole number or text, got a float"),
        ({"sequence_id": True}, "'sequence_id' is a whole number or text, got a bool"),
        ({"sequence_id": "é" * 65}, "'sequence_id' is longer than 128 bytes"),
        ({"sequence_id": 1, "sequence_start": 1}, "'sequence_start' is true or false, got 1"),
        ({"sequence_id": 1, "sequence_end": "true"}, "'sequence_end' is true or false, got 'true'"),
    ],
)
def test_wrong_parameters_are_refused(run, parameters, reason):
    async def check():
        async with graph_of().mock() as server:
            with pytest.raises(InvalidRequest, match=reason):
                await server.infer(x=[1], parameters={"sequence_start": True, **parameters})

    run(check())


def test_a_graph_without_sequences_ignores_the_parameters(run):
    async def check():
        graph = Graph("g", X)
        graph.to(lambda value, context: {"y": np.array([context.sequence is None])}, "step").respond()
        async with graph.mock() as server:
            reply = await server.infer(x=[1], parameters={"sequence_id": 1, "sequence_end": "odd"})
            assert ([True], {}) == (reply.outputs["y"].tolist(), reply.parameters)

    run(check())


def test_a_failed_request_leaves_the_state_of_every_node_and_the_sequence_lives(run):
    def picky(value, state):
        if value["y"][0] > 10:
            raise InvalidRequest("too much")
        state["n"] = state.get("n", 0) + 1
        return {"y": value["y"], "n": np.array([state["n"]])}

    async def check():
        graph = Graph("g", X, sequences={})
        graph.to(total, "sum").to(picky, "picky").respond()
        async with graph.mock() as server:
            assert 1 == await send(server, 7, 1, start=True)
            with pytest.raises(InvalidRequest, match="too much"):
                await send(server, 7, 100)
            reply = await server.infer(x=[2], parameters={"sequence_id": 7})
            assert ([3], [2]) == (reply.outputs["y"].tolist(), reply.outputs["n"].tolist())

    run(check())


def test_a_start_that_fails_begins_nothing(run):
    def failing(value, state):
        raise RuntimeError("broken")

    async def check():
        async with graph_of(failing).mock() as server:
            with pytest.raises(StepFailed, match="broken"):
                await send(server, 7, 1, start=True)
            with pytest.raises(InvalidRequest, match="START"):
                await send(server, 7, 1)

    run(check())


def test_cancelling_a_request_that_waits_cancels_the_sequence(run, manual_clock):
    async def check():
        held = Held()
        async with graph_of(held.__call__).mock() as server:
            running, waiting, behind = (soon(send(server, 7, x, start=x == 1)) for x in (1, 2, 3))
            other = soon(send(server, 8, 4, start=True))
            await manual_clock.settle()
            waiting.cancel()
            await manual_clock.settle()
            assert isinstance(behind.exception(), Cancelled)
            assert "sequence 7 was cancelled: the caller of one of its requests went away" == str(behind.exception())
            held.let_go(1, 4)
            assert [1, 4] == [await running, await other]
            with pytest.raises(InvalidRequest, match="START"):
                await send(server, 7, 5)
            assert [(7, 1), (8, 4)] == held.began
            assert 0 == server.in_flight

    run(check())


def test_cancelling_a_request_that_runs_cancels_the_sequence(run, manual_clock):
    async def check():
        held = Held()
        async with graph_of(held.__call__).mock() as server:
            running, waiting = soon(send(server, 7, 1, start=True)), soon(send(server, 7, 2))
            await manual_clock.settle()
            running.cancel()
            await manual_clock.settle()
            assert isinstance(waiting.exception(), Cancelled)
            held.let_go(5)
            assert 5 == await send(server, 7, 5, start=True)
            assert 0 == server.in_flight

    run(check())


def test_a_request_that_is_cancelled_just_as_its_turn_comes_ends_the_sequence(run, manual_clock):
    requests = []

    async def step(value, state):
        await asyncio.sleep(0.01)
        if value["x"][0] == 1:
            # It runs between the end of this request and the awakening of the next.
            asyncio.get_running_loop().call_soon(requests[1].cancel)
        return total(value, state)

    async def check():
        async with graph_of(step).mock() as server:
            requests.extend(soon(send(server, 7, x, start=x == 1)) for x in (1, 2, 3))
            await manual_clock.advance(1)
            assert 1 == requests[0].result()
            assert requests[1].cancelled()
            assert isinstance(requests[2].exception(), Cancelled)
            assert 0 == server.in_flight
            again = soon(send(server, 7, 5, start=True))
            await manual_clock.advance(1)
            assert 5 == again.result()

    run(check())


@pytest.mark.parametrize("which", [1, 2])
def test_a_call_that_is_cancelled_since_its_time_is_up_leaves_the_sequence_as_it_was(run, manual_clock, which):
    """So does a gRPC client: it cancels what its own clock says is late."""

    async def check():
        held = Held()
        async with graph_of(held.__call__).mock() as server:
            held.let_go(0, 3)
            await send(server, 7, 0, start=True)
            requests = [soon(send(server, 7, x, timeout_s=0.2 if x == which else None)) for x in (1, 2, 3)]
            await manual_clock.advance(0.19)
            requests[which - 1].cancel()
            await manual_clock.settle()
            held.let_go(1, 2)
            await manual_clock.settle()
            assert requests[which - 1].cancelled()
            assert 6 - which == requests[2].result()

    run(check())


def test_the_time_of_a_request_runs_while_it_waits_for_its_turn(run, manual_clock):
    async def check():
        held = Held()
        async with graph_of(held.__call__).mock() as server:
            running, late, behind = (
                soon(send(server, 7, x, start=x == 1, timeout_s=0.1 if x == 2 else None)) for x in (1, 2, 3)
            )
            await manual_clock.advance(0.11)
            assert isinstance(late.exception(), DeadlineExceeded)
            assert "waited for its turn in the sequence" in str(late.exception())
            held.let_go(1, 3)
            assert [1, 4] == [await running, await behind]

    run(check())


def test_the_graphs_own_time_limit_holds_for_the_wait_as_well(run, manual_clock):
    async def check():
        held = Held()
        async with graph_of(held.__call__, graph={"timeout_ms": 100}).mock() as server:
            running = soon(send(server, 7, 1, start=True))
            await manual_clock.advance(0.06)
            waiting = soon(send(server, 7, 2))
            await manual_clock.advance(0.06)
            assert isinstance(running.exception(), DeadlineExceeded)
            assert isinstance(waiting.exception(), InvalidRequest)  # its start failed

    run(check())


def test_a_late_thread_keeps_the_turn_until_it_has_ended(run, manual_clock):
    begun, go, order = threading.Event(), threading.Event(), []

    def step(value, state):
        x = float(value["x"][0])
        if x == 2:
            begun.set()
            go.wait(30)
        order.append(x)
        return total(value, state)

    async def check():
        async with graph_of(step, run="thread").mock() as server:
            assert 1 == await send(server, 7, 1, start=True)
            late = soon(send(server, 7, 2, timeout_s=0.1))
            await manual_clock.settle()
            await asyncio.to_thread(begun.wait, 10)
            await manual_clock.advance(0.2)
            assert isinstance(late.exception(), DeadlineExceeded)
            after = soon(send(server, 7, 3))
            await manual_clock.settle()
            assert ([1.0], False) == (order, after.done())
            go.set()
            assert 4 == await after
            assert [1, 2, 3] == order

    run(check())


@pytest.mark.parametrize("kind", ["plain", "async", "thread", "class"])
def test_every_kind_of_step_keeps_state(run, kind):
    async def later(value, state):
        await asyncio.sleep(0)
        return total(value, state)

    class Total:
        def __call__(self, value, state, context):
            return total(value, state) if context.sequence.id == 7 else None

    step = {"plain": total, "async": later, "thread": total, "class": Total}[kind]

    async def check():
        async with graph_of(step, **({"run": "thread"} if kind == "thread" else {})).mock() as server:
            assert [1, 3] == [await send(server, 7, 1, start=True), await send(server, 7, 2)]

    run(check())


@pytest.mark.parametrize(
    "step",
    [
        total,
        lambda state, value: total(value, state),
        lambda context, value, state: total(value, state),
        lambda state, context, value: total(value, state),
        lambda x, state: total({"x": x} if isinstance(x, np.ndarray) else x, state),
        lambda state, **tensors: total(tensors, state),
        lambda x, *, state: total(x, state),
        lambda state, context: total({"x": np.ones(1)}, state),
    ],
)
def test_state_may_be_any_parameter(run, step):
    async def check():
        async with graph_of(step).mock() as server:
            assert [1, 2] == [await send(server, 7, 1, start=True), await send(server, 7, 1)]

    run(check())


def test_nodes_keep_their_states_apart(run):
    async def check():
        graph = Graph("g", X, sequences={})
        graph.to(total, "a", rename={"outputs": {"y": "x"}}).to(total, "b").respond()
        async with graph.mock() as server:
            assert [1, 3, 6] == [await send(server, 7, 1, start=x == 0) for x in range(3)]

    run(check())


def test_sequences_beyond_the_limit_wait_for_a_place(run, manual_clock):
    async def check():
        async with graph_of(sequences={"max": 1, "max_backlog": 1}).mock() as server:
            await send(server, 1, 1, start=True)
            waiting = soon(send(server, 2, 5, start=True))
            await manual_clock.settle()
            assert not waiting.done()
            await send(server, 1, 1, end=True)
            assert 5 == await waiting

    run(check())


def test_a_sequence_that_waits_for_a_place_is_refused_when_its_smallest_timeout_passes(run, manual_clock):
    async def check():
        async with graph_of(sequences={"max": 1, "idle_ms": 5000}).mock() as server:
            await send(server, 1, 1, start=True)
            first = soon(send(server, 2, 5, start=True))
            second = soon(send(server, 2, 5, timeout_s=0.1))
            await manual_clock.advance(0.11)
            for request in (first, second):
                assert isinstance(request.exception(), Unavailable)
                assert "timeout of the corresponding sequence has been expired" == str(request.exception())

    run(check())


def test_while_stopping_sequences_under_way_end_and_none_begins(run, manual_clock):
    async def check():
        catalog = Catalog()
        await catalog.load([graph_of().compile()])
        graph = catalog.get("g")

        async def one(key, **flags):
            parameters = {"sequence_id": key, **{f"sequence_{name}": flag for name, flag in flags.items()}}
            reply = await infer(graph, InferenceRequest({"x": np.ones(1, "f4")}), Context(parameters=parameters))
            return reply.outputs["y"].tolist()

        await one(1, start=True)
        await one(2, start=True)
        ended = soon(catalog.end_sequences())
        await manual_clock.settle()
        with pytest.raises(Unavailable, match="the server is shutting down: sequence 3 cannot start any more"):
            await one(3, start=True)
        assert [2] == await one(1, end=True)
        assert not ended.done()
        await manual_clock.advance(1.0)  # the other had no request for `idle_ms`
        assert ended.done()
        await catalog.stop()

    run(check())


def test_stopping_refuses_what_waits(run, manual_clock):
    async def check():
        held = Held()
        async with graph_of(held.__call__).mock() as server:
            running, waiting = soon(send(server, 7, 1, start=True)), soon(send(server, 7, 2))
            await manual_clock.settle()
        await manual_clock.settle()
        assert isinstance(waiting.exception(), Unavailable)
        held.let_go(1)
        assert 1 == await running

    run(check())


def plain_steps(value, state):
    for _ in range(2):
        state["n"] = state.get("n", 0) + 1
        yield {"y": np.array([state["n"]])}


async def async_steps(value, state):
    for _ in range(2):
        state["n"] = state.get("n", 0) + 1
        await asyncio.sleep(0)
        yield {"y": np.array([state["n"]])}


async def answers_of(catalog, key, count=None, **flags):
    parameters = {"sequence_id": key, **{f"sequence_{name}": flag for name, flag in flags.items()}}
    request, context = InferenceRequest({"x": np.ones(1, "f4")}), Context(parameters=parameters)
    answers = []
    async with contextlib.aclosing(stream(catalog.get("g"), request, context)) as replies:
        async for reply in replies:
            answers.append(reply.outputs["y"].tolist()[0])
            assert key == reply.parameters["sequence_id"]
            if len(answers) == count:
                break
    return answers


@pytest.mark.parametrize("step, place", [(plain_steps, "inline"), (plain_steps, "thread"), (async_steps, "inline")])
def test_a_generator_keeps_state_once_it_has_come_to_its_end(run, step, place):
    async def check():
        catalog = Catalog()
        await catalog.load([graph_of(step, run=place).compile()])
        assert [1, 2] == await answers_of(catalog, 7, start=True)
        assert [3, 4] == await answers_of(catalog, 7)
        await catalog.stop()

    run(check())


@pytest.mark.parametrize("step, place", [(plain_steps, "inline"), (plain_steps, "thread"), (async_steps, "inline")])
def test_a_reader_that_leaves_a_stream_ends_the_sequence(run, manual_clock, step, place):
    async def check():
        catalog = Catalog()
        await catalog.load([graph_of(step, run=place).compile()])
        assert [1] == await answers_of(catalog, 7, count=1, start=True)
        await manual_clock.settle()
        with pytest.raises(InvalidRequest, match="START"):
            await answers_of(catalog, 7)
        assert 0 == len(catalog.get("g").sequences)
        await catalog.stop()

    run(check())


def test_the_next_request_waits_for_the_end_of_a_stream(run, manual_clock):
    async def check():
        catalog = Catalog()
        await catalog.load([graph_of(async_steps).compile()])
        parameters = {"sequence_id": 7, "sequence_start": True}
        first = stream(catalog.get("g"), InferenceRequest({"x": np.ones(1, "f4")}), Context(parameters=parameters))
        await anext(first)
        second = soon(answers_of(catalog, 7))
        await manual_clock.settle()
        assert not second.done()
        assert [2] == [reply.outputs["y"].tolist()[0] async for reply in first]
        assert [3, 4] == await second
        await catalog.stop()

    run(check())


def test_state_behind_a_generator_is_refused():
    graph = Graph("g", X, sequences={})
    graph.to(plain_steps, "items").to(lambda value: value, "between").to(total, "sum").respond()
    with pytest.raises(GraphInvalid, match="node 'sum': 'sum' keeps state and comes after 'items', a generator"):
        graph.compile()


@pytest.mark.parametrize("key", [None, "parameter:user"])
@pytest.mark.parametrize("kind", ["ab", "bandit"])
def test_a_sequence_stays_with_the_variant_that_has_its_state(run, kind, key):
    branches = {"a": total, "b": total}
    router = routers.Ab(branches, {"a": 1, "b": 1}, key=key) if kind == "ab" else routers.Bandit(branches, "ucb1", key=key)
    change = {"weights": {"b": 1}} if kind == "ab" else {"enabled": {"a": False}}

    async def check():
        async with graph_of(router).mock() as server:
            began = {}
            for number in range(1, 41):
                for turn in range(1, 5):
                    if turn == 3 and number == 20:
                        await server.adjust("step", change)  # holds for sequences that begin later
                    flags = {"sequence_start": turn == 1, "sequence_end": turn == 4}
                    parameters = {"sequence_id": number, "user": f"{number}-{turn}", **flags}
                    reply = await server.infer(x=[1], parameters=parameters)
                    assert [turn] == reply.outputs["y"].tolist()
                    assert reply.parameters["step.variant"] == began.setdefault(number, reply.parameters["step.variant"])
            assert {"a", "b"} == {began[number] for number in range(1, 20)}
            assert {"b"} == {began[number] for number in range(21, 41)}
            decisions = {name: 4 * list(began.values()).count(name) for name in "ab"}
            if kind == "ab":
                assert decisions == server.router("step").report()["decisions"]

    run(check())


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("kind", ["map", "cycle"])
def test_state_in_a_branch_that_runs_several_times_for_a_request_is_refused(kind, chained):
    inside = routers.Chain({"inner": total}) if chained else total
    router = routers.Map(inside) if kind == "map" else routers.Cycle(inside, "False", 2)
    with pytest.raises(GraphInvalid, match="node 'step': runs its branch several times for a request, and 'step.* keeps state"):
        graph_of(router).compile()


def test_free_form_requests_cannot_name_a_sequence():
    graph = Graph("g", "body", sequences={})
    graph.to(lambda value: value, "step").respond()
    with pytest.raises(GraphInvalid, match="'sequences' are named by a request's parameters, which one with a free-form body"):
        graph.compile()
