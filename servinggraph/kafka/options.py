"""The `kafka:` block of a graph file."""

from __future__ import annotations

import ssl
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from servinggraph.importing import load_object
from servinggraph.kafka import development
from servinggraph.settings import Options

__all__ = [
    "CommitOptions",
    "ConnectionOptions",
    "ErrorOptions",
    "InputOptions",
    "KafkaOptions",
    "OutputOptions",
    "RetryOptions",
    "SecurityOptions",
    "TransactionOptions",
]

_SHARED: Final = {"loop", "bootstrap_servers", "client_id"}
_OURS_OF_CONSUMERS: Final = _SHARED | {
    "group_id", "group_instance_id", "enable_auto_commit", "auto_offset_reset", "key_deserializer", "value_deserializer",
    "isolation_level", "session_timeout_ms",
}  # fmt: skip
_OURS_OF_PRODUCERS: Final = _SHARED | {
    "acks", "enable_idempotence", "transactional_id", "key_serializer", "value_serializer", "compression_type",
}  # fmt: skip

Compression = Literal["none", "gzip", "snappy", "lz4", "zstd"]


class SecurityOptions(Options):
    """How a connection to the brokers is encrypted, and who this is."""

    protocol: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = Field(
        "plaintext", description="Encryption (ssl), authentication (sasl), both, or neither."
    )
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "GSSAPI"] = Field(
        "PLAIN", description="How it authenticates, with sasl."
    )
    username: str | None = Field(None, description="User name for PLAIN and SCRAM.")
    password: str | None = Field(None, repr=False, description="Password for PLAIN and SCRAM: `${KAFKA_PASSWORD}`.")
    token: str | None = Field(
        None,
        description="For OAUTHBEARER: `module:Class` of an aiokafka AbstractTokenProvider, made without arguments.",
    )
    ca: str | None = Field(
        None, description="File with root certificates (PEM), from the graph file's folder; by default the system's."
    )
    cert: str | None = Field(None, description="File with this client's certificate chain (PEM), for mutual TLS.")
    key: str | None = Field(None, description="File with the certificate's private key (PEM).")
    key_password: str | None = Field(None, repr=False, description="Password of the private key.")
    check_hostname: bool = Field(True, description="Whether the broker's certificate has to be for the broker's name.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.protocol.startswith("sasl"):
            if self.mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512") and not (self.username and self.password):
                raise ValueError(f"{self.mechanism} needs 'username' and 'password'")
            if self.mechanism == "OAUTHBEARER" and not self.token:
                raise ValueError("OAUTHBEARER needs 'token'")
        elif self.username or self.password or self.token:
            raise ValueError(f"'protocol: {self.protocol}' takes no user: use sasl_ssl (or sasl_plaintext)")
        if "ssl" not in self.protocol and (self.ca or self.cert or self.key):
            raise ValueError(f"'protocol: {self.protocol}' takes no certificates: use ssl or sasl_ssl")
        if bool(self.cert) != bool(self.key):
            raise ValueError("'cert' and 'key' go together")
        return self

    def below(self, base: Path) -> Self:
        """Return the same with the files of a graph that is in a folder: relative ones start from there."""
        return self.model_copy(update={key: str(base / file) for key in ("ca", "cert", "key") if (file := getattr(self, key))})

    def client_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of an aiokafka client.

        Raises:
            OSError: a file cannot be read, or is no certificate (`ssl.SSLError`).
            ImportProblem: there is no such token provider.
        """
        settings: dict[str, Any] = {"security_protocol": self.protocol.upper()}
        if "ssl" in self.protocol:
            try:
                context = ssl.create_default_context(cafile=self.ca)
                if self.cert:
                    context.load_cert_chain(self.cert, self.key, self.key_password)
            except OSError as error:  # whose own text says no file
                files = ", ".join(f"{key} '{file}'" for key in ("ca", "cert", "key") if (file := getattr(self, key)))
                raise OSError(f"the certificates cannot be used, of {files}: {error.strerror or error}") from error
            context.check_hostname = self.check_hostname
            settings["ssl_context"] = context
        if self.protocol.startswith("sasl"):
            settings["sasl_mechanism"] = self.mechanism
            if self.username:
                settings |= {"sasl_plain_username": self.username, "sasl_plain_password": self.password}
            if self.token:
                settings["sasl_oauth_token_provider"] = load_object(self.token)()
        return settings


class ConnectionOptions(Options):
    """Which brokers, and how they are reached."""

    brokers: str = Field(description="Addresses to begin with, `host:port`, with commas between several.")
    security: SecurityOptions = Field(
        default_factory=SecurityOptions, description="Encryption and authentication; by default neither."
    )

    @field_validator("brokers")
    @classmethod
    def _addresses(cls, brokers: str) -> str:
        for address in brokers.split(","):
            host, _, port = address.strip().rpartition(":")
            if not host or not port.isdigit():
                raise ValueError(f"each broker is 'host:port', got {address.strip()!r}")
        return brokers

    def below(self, base: Path) -> Self:
        """Return the same for a graph in a folder; see `SecurityOptions.below`."""
        return self.model_copy(update={"security": self.security.below(base)})

    def client_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of an aiokafka client; see `SecurityOptions.client_settings`.

        In a process with a development broker (`serve --kafka-dev`) they lead there.
        """
        instead = development.address()
        if instead is not None:
            return {"bootstrap_servers": instead.split(",")}
        servers = [address.strip() for address in self.brokers.split(",")]
        return {"bootstrap_servers": servers, **self.security.client_settings()}


class InputOptions(Options):
    """What is read."""

    topics: list[str] = Field(min_length=1, description="Topics that bring requests.")
    group: str = Field(description="Consumer group: replicas with the same group share the partitions.")
    start: Literal["earliest", "latest"] = Field(
        "earliest", description="Where a group without a committed offset begins: with all that is there, or with what comes."
    )
    member: str | None = Field(
        None,
        description="Name of this member, for static membership: one that comes back within `session_timeout_ms` gets its "
        "partitions back without a rebalance. Each replica needs its own: `${HOSTNAME}`.",
    )
    session_timeout_ms: int = Field(
        10_000, ge=1000, description="A member that the broker has not heard of for this long loses its partitions."
    )
    revoke_ms: int = Field(
        10_000, ge=0, description="Longest time that requests in flight have to finish when partitions go to another member."
    )
    max_lag: int | None = Field(
        None, ge=0, description="Not ready while more records than this wait in this member's partitions; no limit by default."
    )
    readiness: Literal["required", "ignored"] = Field(
        "required",
        description="Whether the server is ready only while this is read; `ignored` where HTTP is to be served without Kafka.",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Other arguments of aiokafka's AIOKafkaConsumer.")


class OutputOptions(Options):
    """What answers are written to."""

    topic: str | None = Field(None, description="Topic for answers; without one only requests with a reply topic get any.")
    key: Literal["same", "id", "none"] = Field(
        "same", description="Key of an answer: the request's, its id, or none. Only `same` keeps a key's order."
    )
    reply_topics: list[str] = Field(
        default_factory=list,
        description="Topics that a request may name in its header `x-reply-topic`, as patterns with `*`; none by default.",
    )
    compression: Compression = Field("none", description="Compression of what is written.")
    linger_ms: int = Field(
        5, ge=0, description="How long an answer may wait for others, so that they are written to the broker together."
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Other arguments of aiokafka's AIOKafkaProducer.")

    def may_reply_to(self, topic: str) -> bool:
        """Tell whether a request may have its answer sent to a topic."""
        return any(fnmatchcase(topic, pattern) for pattern in self.reply_topics)


class ErrorOptions(Options):
    """What becomes of requests that cannot be answered."""

    topic: str | None = Field(
        None,
        description="Topic for dead letters: the request as it came, with what was wrong in headers. Without one an error goes "
        "where the answer would have gone.",
    )


class RetryOptions(Options):
    """How often a request is tried again when the failure may pass: a full queue, a remote step that is down."""

    attempts: int = Field(10, ge=1, description="Most attempts, the first included.")
    first_ms: float = Field(100, gt=0, description="Pause after the first attempt; doubled after each further one.")
    most_ms: float = Field(30_000, gt=0, description="Longest pause.")


class CommitOptions(Options):
    """How often what is done is committed. What is not is done again after a crash."""

    records: int = Field(1000, ge=1, description="Commit after so many records.")
    interval_ms: int = Field(1000, ge=1, description="Commit after this time.")


class TransactionOptions(Options):
    """How large a transaction is, with `exactly_once`. Answers are seen by others when theirs has ended."""

    records: int = Field(1000, ge=1, description="End a transaction after so many records.")
    interval_ms: int = Field(100, ge=1, description="End a transaction after this time.")
    timeout_ms: int = Field(60_000, ge=1000, description="The broker undoes a transaction that is open for this long.")


class KafkaOptions(ConnectionOptions):
    """Requests from topics, answers to a topic."""

    input: InputOptions = Field(description="What is read.")
    output: OutputOptions = Field(default_factory=OutputOptions, description="What answers are written to.")
    errors: ErrorOptions = Field(default_factory=ErrorOptions, description="What becomes of requests that cannot be answered.")
    delivery: Literal["at_least_once", "exactly_once", "at_most_once"] = Field(
        "at_least_once",
        description="What a crash may do: answer a request again, nothing (answers and offsets are written in transactions), "
        "or lose requests.",
    )
    order: Literal["key", "partition", "none"] = Field(
        "key", description="Which answers come in the order of their requests: those of a key, of a partition, or none."
    )
    format: Literal["auto", "v2-json", "v2-binary", "v2-protobuf", "msgpack", "json", "raw"] = Field(
        "auto", description="How requests are written; auto goes by the header `content-type`, V2 JSON without one."
    )
    framing: Literal["none", "confluent"] = Field(
        "none", description="Whether a schema id stands before each value, as serializers of a schema registry write it."
    )
    max_in_flight: int = Field(256, ge=1, description="Most requests that run at once.")
    max_waiting: int = Field(4096, ge=1, description="Most records that were read and are not done; then reading pauses.")
    max_waiting_bytes: int = Field(64 * 2**20, ge=1, description="Most bytes of them; then reading pauses.")
    max_message_bytes: int = Field(
        2**20, ge=1024, description="Largest record that is written; an answer over it becomes an error."
    )
    duplicates: int = Field(
        0,
        ge=0,
        description="Remember so many request ids (header `x-request-id` or `ce_id`), and answer a request that is there again "
        "not a second time; 0 for none. Requests that failed are not remembered. Each process remembers its own.",
    )
    retry: RetryOptions = Field(default_factory=RetryOptions, description="Further attempts at a request.")
    commit: CommitOptions = Field(default_factory=CommitOptions, description="How often offsets are committed.")
    transaction: TransactionOptions = Field(
        default_factory=TransactionOptions, description="Size of a transaction, with `exactly_once`."
    )

    @model_validator(mode="after")
    def _ours(self) -> Self:
        for name, settings, ours in (
            ("input", self.input.settings, _OURS_OF_CONSUMERS),
            ("output", self.output.settings, _OURS_OF_PRODUCERS),
        ):
            taken = sorted(ours & settings.keys())
            if taken:
                raise ValueError(f"{name}.settings: {', '.join(taken)} is what this block decides, and the promises rest on it")
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.output.topic or self.output.reply_topics):
            raise ValueError("answers have nowhere to go: give 'output: {topic: ...}', or 'reply_topics' for request and reply")
        if not (self.output.topic or self.errors.topic):
            raise ValueError("errors have nowhere to go: give 'errors: {topic: ...}'")
        written = {"output.topic": self.output.topic, "errors.topic": self.errors.topic}
        for key, topic in written.items():
            if topic in self.input.topics:
                raise ValueError(f"{key} '{topic}' is read, too: its records would come round for ever")
        if self.order != "none" and self.output.key != "same":
            raise ValueError(f"'order: {self.order}' needs 'output: {{key: same}}': other keys go to other partitions")
        if self.max_waiting < self.max_in_flight:
            raise ValueError(f"max_waiting {self.max_waiting} is below max_in_flight {self.max_in_flight}")
        return self
