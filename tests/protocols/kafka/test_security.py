"""Encryption and authentication, on a real broker that asks for both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from servinggraph.kafka import SecurityOptions

pytestmark = pytest.mark.anyio

path = str(Path(__file__).with_name("conftest.py"))
here = next(module for module in sys.modules.values() if getattr(module, "__file__", None) == path)
body, values, until, double, Kit = here.body, here.values, here.until, here.double, here.Kit


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A root, and a certificate from it for the broker and one for a client."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=root")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("broker", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "names", "-out", f"{name}.pem",
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def secured(certificates, tmp_path_factory):
    """A broker that asks for a user, and for a certificate."""

    def pem(name):
        return (certificates / name).read_text().replace("\n", "\\n")

    plain = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    cluster = here.broker_module().Cluster(
        tmp_path_factory.mktemp("secured"), 1,
        {
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:SASL_SSL",
            "inter.broker.listener.name": "PLAINTEXT",
            "sasl.enabled.mechanisms": "PLAIN",
            "sasl.mechanism.inter.broker.protocol": "PLAIN",
            "listener.name.plaintext.plain.sasl.jaas.config":
                f'{plain} username="broker" password="b" user_broker="b" user_me="word";',
            "ssl.keystore.type": "PEM",
            "ssl.keystore.certificate.chain": pem("broker.pem"),
            "ssl.keystore.key": pem("broker.key"),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.certificates": pem("ca.pem"),
            "listener.name.plaintext.ssl.client.auth": "required",
        },
    )  # fmt: skip
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


async def test_a_broker_that_asks_for_a_user_and_a_certificate_is_served_and_a_wrong_password_is_told(
    secured, certificates, tmp_path
):
    security = {
        "protocol": "sasl_ssl", "username": "me", "password": "word", "ca": str(certificates / "ca.pem"),
        "cert": str(certificates / "client.pem"), "key": str(certificates / "client.key"),
    }  # fmt: skip
    settings = {"bootstrap_servers": secured.address, **SecurityOptions.model_validate(security).client_settings()}
    admin = AIOKafkaAdminClient(**settings)
    await admin.start()
    await admin.create_topics([NewTopic(name, 1, 1) for name in ("in", "out", "dead")])
    await admin.close()
    kafka = {
        "brokers": secured.address,
        "security": security,
        "input": {"topics": ["in"], "group": "g"},
        "output": {"topic": "out"},
        "errors": {"topic": "dead"},
    }
    kit = Kit(secured, tmp_path)
    for delivery in ("at_least_once", "exactly_once"):
        async with kit.serve(double, {**kafka, "delivery": delivery}) as served:
            async with AIOKafkaProducer(**settings) as producer:
                await producer.send_and_wait("in", body(3))
            await until(lambda: served.report["produced"] == 1)
    async with AIOKafkaConsumer("out", auto_offset_reset="earliest", isolation_level="read_committed", **settings) as consumer:
        assert [[6.0], [6.0]] == [values(await consumer.getone()) for _ in range(2)]

    wrong = {**kafka, "security": {**security, "password": "wrong"}}
    async with kit.serve(double, wrong, ready=False) as served:
        await until(lambda: "Authentication failed" in served.report["state"], lambda: served.report["state"])
        assert "wrong" not in served.report["state"]
        assert not served.serving.catalog.ready
