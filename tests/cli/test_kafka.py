"""`servinggraph kafka send` and `read`: records with nothing else installed."""

import asyncio
import itertools
import json
import shlex
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from servinggraph.cli import main


def kafka(*words, **options):
    return CliRunner().invoke(main, ["kafka", *words], **options)


@pytest.fixture
def topic(kafka_process):
    return asyncio.run(kafka_process.topic("console", partitions=1))


def test_what_is_sent_is_read(topic, kafka_process, tmp_path):
    (tmp_path / "body.json").write_text('{"a": [1, 2]}')
    brokers = ["--brokers", kafka_process.address]

    sent = kafka(
        "send", topic, f"@{tmp_path}/body.json", "plain", "-", "--key", "k", "--header", "x-request-id=7", *brokers, input="in"
    )
    read = kafka("read", topic, "--from-start", "--count", "3", *brokers)

    assert (0, 0) == (sent.exit_code, read.exit_code), sent.output + read.output
    lines = [json.loads(line) for line in read.output.splitlines()]
    assert [{"a": [1, 2]}, "plain", "in"] == [line["value"] for line in lines]
    assert {("k", "7", "application/json")} == {
        (line["key"], line["headers"]["x-request-id"], line["headers"]["content-type"]) for line in lines
    }
    assert [0, 1, 2] == [line["offset"] for line in lines]


def test_brokers_come_from_the_graph_file(topic, kafka_process, tmp_path):
    (tmp_path / "graph.yaml").write_text(
        f"""
graph: g
inputs: body
kafka: {{brokers: "{kafka_process.address}", input: {{topics: [a], group: g}}, output: {{topic: b}}}}
nodes: {{same: {{step: python, call: "copy:copy"}}}}
answer: same
"""
    )

    done = kafka("send", topic, "1", "--graph", str(tmp_path / "graph.yaml"))

    assert 0 == done.exit_code, done.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["send", "t", "1"], "which brokers?"),
        (["send", "t", "1", "--brokers", "nowhere"], "host:port"),
        (["send", "t", "1", "--header", "x", "--brokers", "127.0.0.1:1"], "expected NAME=VALUE"),
        (["send", "t", "@/no/such/file", "--brokers", "127.0.0.1:1"], "No such file"),
        (["send", "t", "1", "--brokers", "127.0.0.1:1"], "127.0.0.1:1"),
        (["read", "t", "--brokers", "127.0.0.1:1"], "127.0.0.1:1"),
        (["replay", "t"], "which brokers?"),
        (["replay", "--brokers", "127.0.0.1:1"], "which topic?"),
        (["replay", "t", "--brokers", "127.0.0.1:1"], "127.0.0.1:1"),
        (["replay", "t", "--since", "yesterday"], "expected a date and time"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(words, text):
    done = kafka(*words)

    assert 0 != done.exit_code
    assert text in done.output
    assert "Traceback" not in done.output


def test_a_topic_that_is_not_there_is_said(kafka_process):
    done = kafka("read", "no-such-topic", "--brokers", kafka_process.address)

    assert 1 == done.exit_code
    assert "topic 'no-such-topic' does not exist" in done.output


def test_dead_letters_are_sent_back_by_the_graph_file(topic, kafka_process, tmp_path):
    dead = f"{topic}-dead"
    asyncio.run(kafka_process.create_topics({dead: 1}))
    (tmp_path / "graph.yaml").write_text(
        f"""
graph: g
inputs: body
kafka: {{brokers: "{kafka_process.address}", input: {{topics: [{topic}], group: g}}, output: {{topic: b}}, errors: {{topic: {dead}}}}}
nodes: {{same: {{step: python, call: "copy:copy"}}}}
answer: same
"""
    )
    graph = ["--graph", str(tmp_path / "graph.yaml")]
    headers = [f"--header=x-dead-topic={topic}", "--header=x-dead-error=internal", "--header=x-dead-node=same"]
    assert 0 == kafka("send", dead, "1", "2", *headers, *graph).exit_code

    dry = kafka("replay", "--dry-run", "--since", "1h", "--until", "2999-01-01", *graph)
    first = kafka("replay", "--error", "internal", *graph)
    second = kafka("replay", *graph)

    assert f"{dead}: 2 dead letters\n        2  would go to {topic}: internal at same\n" == dry.output
    assert f"{dead}: 2 dead letters\n        2  sent to {topic}: internal at same\n" == first.output
    assert f"{dead}: 0 dead letters\n" == second.output
    read = kafka("read", topic, "--from-start", "--count", "2", *graph)
    assert [1, 2] == [json.loads(line)["value"] for line in read.output.splitlines()]


@pytest.mark.slow
def test_the_lines_that_a_server_with_a_development_broker_prints_work(tmp_path):
    (tmp_path / "graph.yaml").write_text(
        """
graph: g
inputs: {x: {datatype: FP32, shape: [-1]}}
kafka: {brokers: "kafka.invalid:9092", input: {topics: [in], group: g}, output: {topic: out}}
nodes: {same: {step: python, call: "copy:copy"}}
answer: same
"""
    )
    command = [sys.executable, "-m", "servinggraph"]
    serve = [*command, "serve", "graph.yaml", "--kafka-dev", "--http-port", "off", "--grpc-port", "off"]
    with subprocess.Popen(serve, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        try:
            printed = list(itertools.takewhile(lambda line: "kafka read" not in line, iter(server.stdout.readline, "")))
            send = next(shlex.split(line) for line in printed if "kafka send" in line)
            subprocess.run([*command, *send[1:]], check=True, cwd=tmp_path, timeout=120, stderr=subprocess.DEVNULL)
            read = [*command, "kafka", "read", "out", "--from-start", "--count", "1", *send[-2:]]
            (answer,) = subprocess.run(read, check=True, capture_output=True, timeout=120, text=True).stdout.splitlines()
        finally:
            server.send_signal(signal.SIGTERM)
    assert any("for development only" in line for line in printed)
    assert [0.0] == json.loads(answer)["value"]["outputs"][0]["data"]
