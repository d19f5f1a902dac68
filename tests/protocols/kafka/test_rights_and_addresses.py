"""Brokers that refuse some topics, and brokers that come back under another address; each with a broker of its own."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from servinggraph.protocols.kafka import stream as streams

pytestmark = pytest.mark.anyio

path = str(Path(__file__).with_name("conftest.py"))
here = next(module for module in sys.modules.values() if getattr(module, "__file__", None) == path)
body, values, header, until, double, Kit = here.body, here.values, here.header, here.until, here.double, here.Kit


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A broker that knows rights, on which everybody may do what no right says anything of."""
    settings = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
    }
    cluster = here.broker_module().Cluster(tmp_path_factory.mktemp("guarded"), 1, settings)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def forbid(broker, topic, operation, permission=AclPermissionType.DENY):
    """Take a right on a topic from everybody."""
    right = AclBinding(ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:ANONYMOUS", "*", operation, permission)
    admin = AdminClient({"bootstrap.servers": broker.address})
    for made in admin.create_acls([right]).values():
        made.result(20)


def allow(broker, topic, operation):
    """Give everybody a right on a topic, and none besides those that are given."""
    forbid(broker, topic, operation, AclPermissionType.ALLOW)


@pytest.mark.parametrize("operation", [AclOperation.ALL, AclOperation.WRITE])
async def test_a_reply_topic_that_may_not_be_used_is_a_dead_letter_and_ends_nothing_else(guarded, tmp_path, operation):
    kit = Kit(guarded, tmp_path)
    kafka = await kit.options()
    replies = await guarded.topic("replies")
    kafka["output"]["reply_topics"] = ["replies*"]
    forbid(guarded, replies, operation)
    async with kit.serve(double, kafka) as served:
        await kit.send(served.input, {"value": body(1), "headers": [("x-reply-topic", replies.encode())]}, body(2))
        (letter,) = await kit.read(served.dead, 1)
        assert [4.0] == values((await kit.read(served.output, 1))[0])

    assert "invalid_request" == header(letter, "x-dead-error")
    assert replies in header(letter, "x-dead-message")


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_dead_letters_that_may_not_be_written_stop_it_with_one_line_until_they_may(guarded, tmp_path, caplog, delivery):
    caplog.set_level("INFO", "servinggraph.kafka")
    kit = Kit(guarded, tmp_path)
    kafka = await kit.options(delivery=delivery)
    async with kit.serve(double, kafka) as served:
        allow(guarded, served.dead, AclOperation.READ)
        caplog.clear()
        await kit.send(served.input, b"{", body(2))
        await until(lambda: served.report["reconnects"] >= 4, lambda: served.report)
        (line,) = caplog.messages
        allow(guarded, served.dead, AclOperation.WRITE)
        (letter,) = await kit.read(served.dead, 1, quiet_s=0)
        assert [4.0] == values((await kit.read(served.output, 1))[0])
        await served.ready()

    assert f"topic '{served.dead}'" in line
    assert "stopped, because dead letters cannot be written and none may be lost" in line
    assert b"{" == letter.value


async def test_a_topic_of_which_nothing_may_be_known_is_said(guarded, tmp_path):
    kit = Kit(guarded, tmp_path)
    kafka = await kit.options()
    forbid(guarded, kafka["output"]["topic"], AclOperation.ALL)
    async with kit.serve(double, kafka, ready=False) as served:
        said = f"topic '{served.output}' (for answers) may not be used: {guarded.address} gives no rights on it"
        await until(lambda: served.report["state"] == said, lambda: served.report)


class Door:
    """An address that stays, as a service before a broker has one; what comes is handed on to where the broker is now."""

    def __init__(self, target):
        self.target = target
        self._transports = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._hand_on, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *failure):
        self._server.close()
        for transport in self._transports:
            transport.abort()
        await self._server.wait_closed()

    async def _hand_on(self, reader, writer):
        self._transports.add(writer.transport)
        try:
            other_reader, other_writer = await asyncio.open_connection(*self.target.split(":"))
        except OSError:
            writer.transport.abort()
            return
        self._transports.add(other_writer.transport)
        await asyncio.gather(_copy(reader, other_writer), _copy(other_reader, writer))


async def _copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.transport.abort()


@pytest.mark.slow
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_a_broker_that_comes_back_under_another_address_is_found_again(tmp_path, monkeypatch, delivery):
    monkeypatch.setattr(streams, "_SILENT_S", 3.0)
    module = here.broker_module()
    cluster = module.Cluster(tmp_path / "moving", 1)
    (broker,) = cluster.brokers
    try:
        await asyncio.to_thread(cluster.start)
        kit = Kit(cluster, tmp_path)
        async with Door(broker.address) as door:
            kafka = {**await kit.options(delivery=delivery), "brokers": door.address}
            async with kit.serve(double, kafka) as served:
                await kit.send(served.input, body(1))
                await kit.read(served.output, 1)
                broker.kill()
                moved = "127.0.0.1:{}".format(*module.free_ports(1))
                properties = tmp_path / "moving" / "broker-1" / "server.properties"
                properties.write_text(properties.read_text().replace(broker.address, moved))
                broker.address = door.target = kit.address = moved
                await asyncio.to_thread(broker.start)
                await kit.send(served.input, body(2))
                await until(lambda: served.report["produced"] >= 2, lambda: served.report, patience_s=60)
                await served.ready()
    finally:
        cluster.stop()
