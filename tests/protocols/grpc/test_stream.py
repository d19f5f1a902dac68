"""Streams of requests and answers: order, errors, ends, slow readers."""

import asyncio

import grpc
import numpy as np
import pytest

from servinggraph import Context, Graph

pytestmark = pytest.mark.anyio

X = np.array([1.0, 2.0], np.float32)
FINAL = "triton_final_response"


def ordinary(work=lambda value: {"y": value["x"]}, name="plain"):
    return Graph(name, {"x": ("FP32", [-1])}, version=2).to(work, "step").respond()


def counting(value):
    for number in range(int(value["x"][0])):
        yield {"y": np.array([number], np.float32)}


def decoupled(work=counting, name="many"):
    return Graph(name, {"x": ("FP32", [-1])}).to(work, "count").respond()


async def items(call):
    got = []
    while (item := await call.read()) is not grpc.aio.EOF:
        got.append(item)
    return got


async def exchange(server, *requests, **options):
    """Send requests over one stream, close it, and return everything that came."""
    call = server.stream(**options)
    for request in requests:
        await call.write(request)
    await call.done_writing()
    async with asyncio.timeout(60):
        return await items(call)


def final(item):
    return item.infer_response.parameters[FINAL].bool_param


async def test_answers_of_ordinary_graphs_come_in_the_order_of_their_requests(live):
    async def late(value):
        await asyncio.sleep(0.02 if value["x"][0] == 0 else 0)
        return {"y": value["x"]}

    async with live(ordinary(late), ordinary(name="other")) as server:
        requests = [server.request(("plain", "other")[n % 2], {"x": np.array([n], np.float32)}, id=str(n)) for n in range(20)]
        got = await exchange(server, *requests)

        assert [(str(n), [float(n)]) for n in range(20)] == [
            (item.infer_response.id, server.numbers(item.infer_response)) for item in got
        ]
        assert all(final(item) and not item.error_message for item in got)
        assert ("plain", "2") == (got[0].infer_response.model_name, got[0].infer_response.model_version)
        assert 0 == server.in_flight


async def test_requests_of_one_stream_start_in_the_order_in_which_they_came(live):
    started = []

    async def note(value):
        started.append(value["x"][0])
        await asyncio.sleep(0)
        return {"y": value["x"]}

    async with live(ordinary(note)) as server:
        await exchange(server, *(server.request("plain", {"x": np.array([n], np.float32)}) for n in range(50)))

    assert list(range(50)) == started


async def test_a_decoupled_graph_gives_its_answers_one_by_one_and_none_is_said_to_be_the_last(live):
    async with live(decoupled()) as server:
        got = await exchange(server, server.request("many", {"x": np.array([3], np.float32)}, id="a"))

        assert [[0.0], [1.0], [2.0]] == [server.numbers(item.infer_response) for item in got]
        assert [("a", False)] * 3 == [(item.infer_response.id, final(item)) for item in got]
        assert all(FINAL in item.infer_response.parameters for item in got)


async def test_an_empty_final_answer_comes_when_it_is_asked_for(live):
    async with live(decoupled()) as server:
        for count in (2, 0):
            x = np.array([count], np.float32)
            got = await exchange(
                server,
                server.request("many", {"x": x}, id="a", triton_enable_empty_final_response=True),
                server.request("many", {"x": x}, id="b", triton_enable_empty_final_response=False),
            )

            of_a = [item.infer_response for item in got if item.infer_response.id == "a"]
            assert [False] * count + [True] == [answer.parameters[FINAL].bool_param for answer in of_a]
            assert ("many", "1", [], []) == (
                of_a[-1].model_name, of_a[-1].model_version, list(of_a[-1].outputs), list(of_a[-1].raw_output_contents)
            )  # fmt: skip
            assert count == sum(item.infer_response.id == "b" for item in got)


async def test_an_empty_final_answer_is_not_for_ordinary_graphs(live):
    async with live(ordinary()) as server:
        got = await exchange(server, server.request("plain", {"x": X}, triton_enable_empty_final_response=True))

    assert [(True, 1)] == [(final(item), len(item.infer_response.outputs)) for item in got]


async def test_answers_of_several_decoupled_requests_interleave(live):
    turns = [asyncio.Event() for _ in range(4)]

    async def in_turn(value):
        first = int(value["x"][0])
        for number in (first, first + 2):
            await turns[number].wait()
            yield {"y": np.array([number], np.float32)}

    async with live(decoupled(in_turn)) as server:
        call = server.stream()
        for n in (0, 1):
            await call.write(server.request("many", {"x": np.array([n], np.float32)}, id=str(n)))
        await call.done_writing()
        got = []
        for turn in turns:
            turn.set()
            got.append((await call.read()).infer_response)

        assert [("0", [0.0]), ("1", [1.0]), ("0", [2.0]), ("1", [3.0])] == [(a.id, server.numbers(a)) for a in got]
        assert grpc.aio.EOF is await call.read()


async def test_a_decoupled_answer_does_not_wait_for_an_ordinary_one(live):
    free = asyncio.Event()

    async def wait(value):
        await free.wait()
        return {"y": value["x"]}

    async with live(ordinary(wait), decoupled()) as server:
        call = server.stream()
        await call.write(server.request("plain", {"x": X}, id="slow"))
        await call.write(server.request("many", {"x": X}, id="quick"))
        assert "quick" == (await call.read()).infer_response.id
        free.set()
        assert "slow" == (await call.read()).infer_response.id
        await call.done_writing()
        assert grpc.aio.EOF is await call.read()


def broken(value):
    if value["x"][0] < 0:
        raise RuntimeError("below zero")
    return {"y": value["x"]}


async def test_an_error_is_an_item_with_the_request_s_id_and_leaves_the_stream_open(live):
    minus = np.array([-1], np.float32)
    async with live(ordinary(broken), max_tensors=1) as server:
        requests = [
            server.request("plain", {"x": X}, id="a"),
            server.request("plain", {"x": minus}, id="b"),
            server.request("nope", {"x": X}, id="c"),
            server.request("plain", {"z": X}, id="d"),
            server.request("plain", {"x": X}, id="e", version="x"),
            server.request("plain", {"x": X}, id="f"),
        ]
        got = await exchange(server, *requests)

        assert list("abcdef") == [item.infer_response.id for item in got]
        assert [
            "", "node 'step': RuntimeError: below zero", "Request for unknown model: 'nope' is not found",
            "[request id: d] unexpected inference input 'z'", "failed to get model version", "",
        ] == [item.error_message[: len(text)] for item, text in zip(got, [
            "", "node 'step': RuntimeError: below zero", "Request for unknown model: 'nope' is not found",
            "[request id: d] unexpected inference input 'z'", "failed to get model version", "",
        ], strict=True)]  # fmt: skip
        assert all(map(final, got))
        assert [2, 0, 0, 0, 0, 2] == [len(server.numbers(i.infer_response)) if i.infer_response.outputs else 0 for i in got]
        assert 0 == server.in_flight


async def test_a_decoupled_graph_that_fails_gives_what_it_had_and_one_error(live):
    def fail(value):
        yield {"y": value["x"]}
        raise RuntimeError("no more")

    async with live(decoupled(fail)) as server:
        got = await exchange(server, server.request("many", {"x": X}, id="a", triton_enable_empty_final_response=True))

        assert [("", False), ("node 'count': RuntimeError: no more", True)] == [(i.error_message, final(i)) for i in got]
        assert ["a", "a"] == [item.infer_response.id for item in got]


async def test_bytes_that_are_no_request_are_an_error_of_the_stream_and_leave_it_open(live):
    async with live(ordinary()) as server:
        call = server.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
        good = server.request("plain", {"x": X}).SerializeToString()
        for data in (b"\xff\xff", good):
            await call.write(data)
        await call.done_writing()
        first, second = await items(call)

    assert b"failed to parse the request" in first
    assert b"failed" not in second


async def test_with_triton_grpc_error_the_first_failure_of_a_graph_ends_the_stream_with_its_status(live):
    started, ended = asyncio.Event(), []

    async def forever(value):
        if value["x"][0] < 0:
            await started.wait()
            raise RuntimeError("below zero")
        try:
            started.set()
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async with live(ordinary(forever)) as server:
        call = server.stream(metadata=[("triton_grpc_error", "true")])
        for number, name in ((1, "a"), (-1, "b")):
            await call.write(server.request("plain", {"x": np.array([number], np.float32)}, id=name))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await items(call)

        assert (grpc.StatusCode.INTERNAL, "node 'step': RuntimeError: below zero") == (
            error.value.code(),
            error.value.details(),
        )
        assert [True] == ended
        assert 0 == server.in_flight


async def test_with_triton_grpc_error_a_refused_request_is_an_item_all_the_same(live):
    async with live(ordinary()) as server:
        requests = [server.request("nope", {"x": X}), server.request("plain", {"x": X})]
        got = await exchange(server, *requests, metadata=[("triton_grpc_error", "true")])

    assert [True, False] == [bool(item.error_message) for item in got]


async def test_a_stream_without_requests_ends(live):
    async with live(ordinary()) as server:
        assert [] == await exchange(server)


async def test_cancelling_a_stream_cancels_everything_on_it(live, eventually):
    events = []

    async def wait(value):
        events.append("in")
        try:
            await asyncio.sleep(60)
        finally:
            events.append("out")

    async def generate(value):
        events.append("in")
        try:
            while True:
                yield {"y": value["x"]}
        finally:
            events.append("out")

    async with live(ordinary(wait), decoupled(generate)) as server:
        call = server.stream()
        for model in ("plain", "many", "plain"):
            await call.write(server.request(model, {"x": X}))
        await eventually(lambda: events.count("in") == 3)
        await call.read()
        call.cancel()
        await eventually(lambda: events.count("out") == 3)
        await eventually(lambda: server.in_flight == 0)
        with pytest.raises(asyncio.CancelledError):
            await call.read()


async def test_closing_a_stream_finishes_what_is_in_flight(live):
    free = asyncio.Event()

    async def wait(value):
        await free.wait()
        return {"y": value["x"]}

    async with live(ordinary(wait)) as server:
        call = server.stream()
        await call.write(server.request("plain", {"x": X}))
        await call.done_writing()
        asyncio.get_running_loop().call_later(0.02, free.set)
        assert 1 == len(await items(call))
        assert grpc.StatusCode.OK is await call.code()


async def test_a_slow_reader_slows_a_decoupled_graph(live, eventually):
    made, closed = [], []

    def generate(value):
        try:
            while True:
                made.append(1)
                yield {"y": np.zeros(250_000, np.float32)}
        finally:
            closed.append(True)

    async with live(decoupled(generate)) as server:
        call = server.stream()
        await call.write(server.request("many", {"x": X}))
        await call.read()
        before = -1
        while len(made) != before:  # it stands still once the buffers are full, of which the system has some as well
            before = len(made)
            assert before < 200
            await asyncio.sleep(0.3)

        for _ in range(before + 1):  # and goes on as it is read
            await call.read()
        call.cancel()
        await eventually(lambda: closed)
        await eventually(lambda: server.in_flight == 0)


async def test_a_stream_reads_no_more_requests_than_it_may_have_unanswered(live, eventually):
    free, entered = asyncio.Event(), []

    async def wait(value):
        entered.append(1)
        await free.wait()
        return {"y": value["x"]}

    async with live(ordinary(wait), max_stream_requests=3) as server:
        call = server.stream()
        for n in range(10):
            await call.write(server.request("plain", {"x": X}, id=str(n)))
        await eventually(lambda: len(entered) == 3)
        await asyncio.sleep(0.05)
        assert (3, 3) == (len(entered), server.in_flight)
        free.set()
        await call.done_writing()
        assert [str(n) for n in range(10)] == [item.infer_response.id for item in await items(call)]


async def test_a_server_that_is_full_refuses_requests_of_a_stream_and_not_the_stream(live):
    free = asyncio.Event()

    async def wait(value):
        await free.wait()
        return {"y": value["x"]}

    async with live(ordinary(wait), decoupled(), max_in_flight=1) as server:
        call = server.stream()
        for model in ("plain", "many", "plain", "many"):
            await call.write(server.request(model, {"x": X}, id=model))
        for _ in range(2):  # and with the second one the request before it has been refused as well
            refused = await call.read()
            assert "many" == refused.infer_response.id
            assert "limit 'max_in_flight' = 1" in refused.error_message
        free.set()
        await call.done_writing()
        rest = await items(call)
        assert [("", True), ("the server is full", True)] == [(i.error_message[:18], final(i)) for i in rest]
        assert 0 == server.in_flight


async def test_a_step_that_cancels_itself_is_a_failure_of_its_request_only(live):
    async def cancel(value):
        raise asyncio.CancelledError

    async with live(ordinary(cancel)) as server:
        got = await exchange(server, *(server.request("plain", {"x": X}) for _ in range(2)))

    assert ["node 'step': "] * 2 == [item.error_message[:13] for item in got]


async def test_a_stream_s_deadline_is_every_request_s(live):
    seen = []

    async def tell(value, context: Context):
        seen.append(context.deadline - asyncio.get_running_loop().time())
        return {"y": value["x"]}

    async with live(ordinary(tell)) as server:
        await exchange(
            server, server.request("plain", {"x": X}), server.request("plain", {"x": X}, timeout=50_000_000), timeout=150
        )

    assert 100 < seen[0] <= 150.5
    assert 0 < seen[1] <= 50


async def test_a_stop_finishes_what_is_in_flight_and_then_ends_open_streams(live):
    free, entered = asyncio.Event(), asyncio.Event()

    async def wait(value):
        entered.set()
        await free.wait()
        return {"y": value["x"]}

    async with live(ordinary(wait)) as server:
        busy, idle = server.stream(), server.stream()
        await idle.write(server.request("nope", {"x": X}))
        await idle.read()
        await busy.write(server.request("plain", {"x": X}))
        await entered.wait()
        stopping = asyncio.ensure_future(server.front_end.stop(60))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await items(idle)
        assert grpc.StatusCode.UNAVAILABLE is error.value.code()
        free.set()
        assert [1.0, 2.0] == server.numbers((await busy.read()).infer_response)
        with pytest.raises(grpc.aio.AioRpcError, match="the server is shutting down"):
            await busy.read()
        async with asyncio.timeout(60):
            await stopping


async def test_at_the_end_of_its_grace_a_stop_cuts_streams_off(live):
    ended, entered = [], asyncio.Event()

    async def wait(value):
        entered.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async with live(ordinary(wait)) as server:
        call = server.stream()
        await call.write(server.request("plain", {"x": X}))
        await entered.wait()
        stopping = asyncio.ensure_future(server.front_end.stop(0.05))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
        await stopping

    assert grpc.StatusCode.UNAVAILABLE is error.value.code()
    assert [True] == ended
