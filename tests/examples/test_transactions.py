"""The transactions example as a user runs it, on a real broker: server, producer and consumer are processes of their own.

The judge is what the two ONNX models say by onnxruntime alone, averaged by numpy.
"""

import asyncio
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from aiokafka import AIOKafkaConsumer

from servinggraph import Graph
from servinggraph.kafka.development import development_broker

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "transactions"
COUNT, POISON_EVERY, SEED = 600, 100, 7


@pytest.fixture(scope="module")
def modules():
    """Return what the example's modules define."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        return {name: runpy.run_path(str(EXAMPLE / f"{name}.py")) for name in ("transactions", "transaction_steps")}
    finally:
        sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def documents(modules):
    return [document for document, _ in itertools.islice(modules["transactions"]["transactions"](SEED), COUNT)]


def risks(rows):
    """Return what the models say without servinggraph."""
    sessions = [onnxruntime.InferenceSession(EXAMPLE / "models" / f"{name}.onnx") for name in ("trees", "mlp")]
    answers = [session.run(["probabilities"], {"features": rows})[0][:, 1] for session in sessions]
    return np.mean(answers, axis=0)


async def all_of(address, topic, count):
    async with AIOKafkaConsumer(topic, bootstrap_servers=address, auto_offset_reset="earliest") as consumer:
        return [await asyncio.wait_for(consumer.getone(), 60) for _ in range(count)]


@pytest.mark.slow
def test_a_stream_of_transactions_is_decided_as_the_models_alone_would(kafka, documents, modules, tmp_path):
    environment = {**os.environ, "KAFKA": kafka.address, "PYTHONUNBUFFERED": "1"}
    asyncio.run(kafka.create_topics({"transactions": 3, "decisions": 3, "transactions-dead": 1}))

    def example(*command):
        return subprocess.run(
            [sys.executable, *command], cwd=EXAMPLE, env=environment, capture_output=True, text=True, timeout=150, check=True
        ).stdout

    serve = [sys.executable, "-m", "servinggraph", "serve", EXAMPLE / "graph.yaml", "--http-port", "off", "--grpc-port", "off"]
    dead = COUNT // POISON_EVERY
    with (
        (tmp_path / "out").open("w") as output,
        subprocess.Popen(serve, env=environment, stdout=output, stderr=subprocess.STDOUT) as server,
    ):
        try:
            told = example("produce.py", "--count", str(COUNT), "--rate", "0", "--poison-every", str(POISON_EVERY))
            watched = example("watch.py", "--count", str(COUNT - dead), "--from-start")
        finally:
            server.send_signal(signal.SIGTERM)
    assert 0 == server.returncode, (tmp_path / "out").read_text()
    assert f"{COUNT} transactions written" in told
    assert f"{COUNT - dead} decisions" in watched

    async def read():
        return await all_of(kafka.address, "decisions", COUNT - dead), await all_of(kafka.address, "transactions-dead", dead)

    decisions, letters = asyncio.run(read())
    broken = set(range(POISON_EVERY - 1, COUNT, POISON_EVERY))
    fine = [document for number, document in enumerate(documents) if number not in broken]
    rows = np.concatenate([modules["transaction_steps"]["features"](document)["features"] for document in fine])
    expected = dict(zip((document["id"] for document in fine), risks(rows), strict=True))
    answered = {answer["transaction"]: answer["risk"] for answer in (json.loads(record.value) for record in decisions)}
    assert expected.keys() == answered.keys()
    np.testing.assert_allclose([answered[name] for name in expected], list(expected.values()), atol=1e-4)
    assert {documents[number]["id"] for number in broken} == {json.loads(letter.value)["id"] for letter in letters}
    headers = dict(letters[0].headers)
    assert (b"invalid_request", b"features") == (headers["x-dead-error"], headers["x-dead-node"])
    assert b"a transaction needs 'amount'" in headers["x-dead-message"]
    # Of a card, in the order of its transactions.
    order = {document["id"]: number for number, document in enumerate(documents)}
    for _, own in itertools.groupby(sorted(decisions, key=lambda record: record.key), key=lambda record: record.key):
        numbers = [order[json.loads(record.value)["transaction"]] for record in own]
        assert sorted(numbers) == numbers


def test_the_sample_is_decided_without_a_broker():
    with Graph.load(EXAMPLE / "graph.yaml").mock() as server:
        answer = server.invoke(json.loads((EXAMPLE / "sample.json").read_text()))

    assert {"transaction", "decision", "risk"} == answer.keys()
    assert "approve" == answer["decision"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"amount": None}, "this is no transaction"),
        ({"amount": -1}, "amounts are above 0"),
        ({"category": "weapons"}, "category 'weapons' is not one of"),
        ({"history": {}}, "a transaction needs 'usual_amount'"),
    ],
)
def test_what_is_no_transaction_is_refused_in_words(change, text):
    document = json.loads((EXAMPLE / "sample.json").read_text()) | change

    with Graph.load(EXAMPLE / "graph.yaml").mock() as server, pytest.raises(Exception, match=text):
        server.invoke(document)


def test_the_stage_in_front_puts_transactions_on_the_topic(monkeypatch):
    document = json.loads((EXAMPLE / "sample.json").read_text())
    monkeypatch.setenv("KAFKA", "kafka.invalid:9092")

    with development_broker() as address, Graph.load(EXAMPLE / "intake.yaml").mock() as server:
        receipt = server.invoke(document)
        with pytest.raises(Exception, match="a transaction needs 'amount'"):
            server.invoke({key: value for key, value in document.items() if key != "amount"})
        (record,) = asyncio.run(all_of(address, "transactions", 1))

    assert ["transactions"] == receipt["topic"]
    assert (document, document["card"].encode()) == (json.loads(record.value), record.key)
    assert receipt["id"] == [dict(record.headers)["x-request-id"].decode()]


def test_the_stream_is_the_same_for_the_same_seed(modules):
    def some(seed):
        return list(itertools.islice(modules["transactions"]["transactions"](seed), 50))

    assert some(7) == some(7) != some(8)


@pytest.mark.slow
def test_training_gives_the_models_that_are_there(tmp_path):
    subprocess.run([sys.executable, EXAMPLE / "train.py", tmp_path], check=True, capture_output=True, timeout=150)
    rows = np.random.default_rng(0).normal(size=(50, 13)).astype("f4")
    for name in ("trees", "mlp"):
        both = [
            onnxruntime.InferenceSession(folder / "models" / f"{name}.onnx").run(["probabilities"], {"features": rows})[0]
            for folder in (tmp_path, EXAMPLE)
        ]
        np.testing.assert_allclose(*both, atol=1e-3)
