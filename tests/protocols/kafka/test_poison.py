"""One message among ten thousand that no graph can take: the others do not notice, and once mended it is answered as well."""

import json

import pytest

from servinggraph.clients.dead_letters import Selection, replay
from servinggraph.kafka import ConnectionOptions

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

COUNT, POISON = 10_000, 4321


def fragile(value):
    if value["x"][0] == POISON:
        raise ZeroDivisionError("this one")
    return {"y": value["x"] + 1}


def mended(value):
    return {"y": value["x"] + 1}


def body(number):
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [number]}
    return json.dumps({"id": str(number), "inputs": [tensor]}).encode()


def answered(records):
    documents = [json.loads(record.value) for record in records]
    return {int(document["id"]): document["outputs"][0]["data"][0] for document in documents}


async def test_poison_is_set_aside_and_answered_after_the_mend(kit):
    kafka = await kit.options(partitions=3)
    requests = [(str(number % 100).encode(), body(number)) for number in range(COUNT)]
    async with kit.serve(fragile, kafka) as served:
        await kit.send(served.input, *requests)
        answers = await kit.read(served.output, COUNT - 1, quiet_s=0.3)
        letters = await kit.read(served.dead, 1, quiet_s=0.3)
    async with kit.serve(mended, kafka) as served:
        summary = await replay(ConnectionOptions(brokers=kit.address), served.dead, Selection(nodes=("step",)))
        everything = await kit.read(served.output, COUNT, quiet_s=0.3)

    assert [body(POISON)] == [letter.value for letter in letters]
    assert {("internal", "step", kafka["input"]["topics"][0]): 1} == summary.sent
    right = {number: number + 1.0 for number in range(COUNT) if number != POISON}
    assert (COUNT - 1, right) == (len(answers), answered(answers))
    assert (COUNT, right | {POISON: POISON + 1.0}) == (len(everything), answered(everything))
