"""The rules of requests with any number of answers, whatever wire they came over."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import numpy as np
import pytest

from servinggraph import Context, Graph, InvalidRequest, routers, steps
from servinggraph.errors import Unsupported

pytestmark = pytest.mark.anyio

X = {"x": np.array([3], np.int32)}


def a_graph(*steps_in_order, **options):
    graph = Graph("g", {"x": ("INT32", [-1])}, **options)
    node = graph
    for number, step in enumerate(steps_in_order):
        node = node.to(step, f"step{number}")
    return node.respond()


def count(value):
    for number in range(int(value["x"][0])):
        yield {"y": np.array([number], np.int32)}


async def count_async(value):
    for number in range(int(value["x"][0])):
        await asyncio.sleep(0)
        yield {"y": np.array([number], np.int32)}


class Endless:
    """A generator without end of items of 8 KB."""

    def __init__(self):
        self.made = 0
        self.ended = 0

    async def items(self, value):
        try:
            while True:
                await asyncio.sleep(0)
                self.made += 1
                yield {"y": np.full(1000, self.made, np.int64)}
        finally:
            self.ended += 1


async def all_of(answers):
    async with aclosing(answers) as answers:
        return [answer async for answer in answers]


async def eventually(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("step", [count, count_async, steps.Python(count, run="thread")], ids=["inline", "async", "thread"])
async def test_answers_come_in_order_each_with_the_request_s_id(streaming, step):
    async with streaming.open(a_graph(step)) as client:
        got = await all_of(client.stream(X, "r"))

        assert [("r", {"y": [number]}) for number in range(3)] == [(answer.id, answer.outputs) for answer in got]
        assert 0 == client.in_flight


async def test_there_may_be_no_answer(streaming):
    async with streaming.open(a_graph(count)) as client:
        assert [] == await all_of(client.stream({"x": np.array([0], np.int32)}, "r"))


async def test_an_ordinary_graph_gives_one(streaming):
    async with streaming.open(a_graph(lambda value: {"y": value["x"]})) as client:
        assert [("", {"y": [3]}, {})] == await all_of(client.stream(X))


async def test_items_go_through_batches_and_ensembles_behind(streaming):
    def plus(number):
        return lambda value: {"y": (value["y"] + number).astype(np.float32)}

    batched = steps.Python(plus(10), batch={"max_rows": 8})
    ensemble = routers.Ensemble({"a": plus(1), "b": plus(3)})
    async with streaming.open(a_graph(count, batched, ensemble)) as client:
        got = await all_of(client.stream(X))

    assert [[12], [13], [14]] == [answer.outputs["y"] for answer in got]
    assert [{"step2.members": "a,b"}] * 3 == [answer.parameters for answer in got]


async def test_text_streams(streaming):
    def words(value):
        for word in ("é", "", "a\nb"):
            yield {"y": np.array([word])}

    async with streaming.open(a_graph(words)) as client:
        assert [["é"], [""], ["a\nb"]] == [answer.outputs["y"] for answer in await all_of(client.stream(X))]


async def test_response_parameters_belong_to_their_answer(streaming):
    def behind(value, context: Context):
        if value["y"][0] == 1:
            context.response_parameters["number"] = 1
        return value

    async with streaming.open(a_graph(count, behind)) as client:
        assert [{}, {"number": 1}, {}] == [answer.parameters for answer in await all_of(client.stream(X))]


async def test_steps_see_the_request_s_parameters(streaming):
    def ask(value, context: Context):
        yield {"y": np.array([context.parameters["wanted"]])}

    async with streaming.open(a_graph(ask)) as client:
        assert [7] == (await all_of(client.stream(X, wanted=7)))[0].outputs["y"]


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_a_failure_comes_after_the_answers_before_it(streaming, failed, at):
    def fails(value):
        for number in range(at):
            yield {"y": np.array([number])}
        raise ValueError("broken")

    got = []
    async with streaming.open(a_graph(fails)) as client:
        with pytest.raises(failed, match="node 'step0': ValueError: broken"):
            async for answer in client.stream(X, "r"):
                got.append(answer)
        await eventually(lambda: client.in_flight == 0)

    assert at == len(got)


async def test_a_failure_behind_a_generator_names_its_own_node_and_ends_the_generator(streaming, failed):
    endless = Endless()

    def fails(value):
        raise InvalidRequest("no")

    async with streaming.open(a_graph(endless.items, fails)) as client:
        with pytest.raises(failed, match="node 'step1': no"):
            await all_of(client.stream(X))
        assert (1, 1) == (endless.made, endless.ended)


async def test_a_request_that_does_not_fit_never_runs(streaming, failed):
    endless = Endless()
    async with streaming.open(a_graph(endless.items)) as client:
        with pytest.raises(failed, match="'y'"):
            await all_of(client.stream({"x": X["x"], "y": np.array([[1]], np.int32)}))
        with pytest.raises(failed, match="missing required input"):
            await all_of(client.stream({}))
        await eventually(lambda: client.in_flight == 0)

    assert 0 == endless.made


@pytest.mark.parametrize("after", [1, 5])
async def test_a_client_that_leaves_ends_the_generator_and_frees_its_slot(streaming, after):
    endless = Endless()
    async with streaming.open(a_graph(endless.items)) as client:
        answers = client.stream(X)
        for _ in range(after):
            await anext(answers)
        assert 1 == client.in_flight
        await answers.aclose()
        await eventually(lambda: client.in_flight == 0)
        assert 1 == endless.ended


async def test_a_client_that_leaves_before_the_first_answer_ends_the_generator(streaming):
    ended = []

    async def waits(value):
        try:
            await asyncio.Event().wait()
            yield value
        finally:
            ended.append(True)

    async with streaming.open(a_graph(waits)) as client:
        task = asyncio.ensure_future(anext(client.stream(X)))
        await eventually(lambda: client.in_flight == 1)
        task.cancel()
        await asyncio.wait([task])
        await eventually(lambda: ended and client.in_flight == 0)


async def test_a_deadline_holds_for_the_whole_stream(streaming, failed):
    got = []

    async def slow(value):
        while True:
            await asyncio.sleep(0.1)
            yield {"y": value["x"]}

    async with streaming.open(a_graph(slow)) as client:
        for seconds in (1, 5, 25):  # a machine that stands still for all of its time gives no answer
            with pytest.raises(failed, match="Request timeout expired"):
                async for answer in client.stream(X, timeout=seconds * 1_000_000):
                    got.append(answer)
            await eventually(lambda: client.in_flight == 0)
            if got:
                break

    assert 0 < len(got) < 12 * seconds


async def test_a_reader_that_pauses_stops_the_generator(streaming):
    endless = Endless()
    async with streaming.open(a_graph(endless.items)) as client:
        answers = client.stream(X)
        await anext(answers)
        before = -1
        while before != endless.made:  # stands still once the buffers on the way are full
            before = endless.made
            await asyncio.sleep(0.1)
        assert before < 5000
        for _ in range(before + 1):
            await anext(answers)
        assert endless.made > before
        await answers.aclose()
        await eventually(lambda: client.in_flight == 0 and endless.ended == 1)


async def test_streams_run_side_by_side(streaming):
    turn = asyncio.Condition()
    order = []

    async def in_turns(value):
        mine = int(value["x"][0])
        for number in range(3):
            async with turn:
                await turn.wait_for(lambda number=number: len(order) == 2 * number + mine)
                order.append(mine)
                turn.notify_all()
            yield {"y": np.array([10 * mine + number])}

    async with streaming.open(a_graph(in_turns)) as client:
        first, second = await asyncio.gather(*(all_of(client.stream({"x": np.array([mine], np.int32)})) for mine in (0, 1)))

    assert [[0], [1], [2]] == [answer.outputs["y"] for answer in first]
    assert [[10], [11], [12]] == [answer.outputs["y"] for answer in second]


async def test_one_stream_takes_one_slot(streaming, failed):
    endless = Endless()
    async with streaming.open(a_graph(endless.items), max_in_flight=1) as client:
        answers = client.stream(X)
        await anext(answers)
        with pytest.raises(failed, match=r"\(limit 'max_in_flight' = 1\)"):
            await all_of(client.stream(X))
        await answers.aclose()
        await eventually(lambda: client.in_flight == 0)


async def test_a_call_for_exactly_one_answer_is_refused(front_end):
    async with front_end.open(a_graph(count)) as client:
        with pytest.raises(Unsupported, match="decoupled"):
            await client.infer(X)

        assert 0 == client.in_flight
