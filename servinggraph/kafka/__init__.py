"""What everything that speaks Kafka shares, without I/O: how a broker is reached, what is read and written, header names.

The front end (`protocols/kafka`), the steps that write to topics and the client build on it; none of
them has to be installed to read a graph file that has a `kafka:` block.
"""

from servinggraph.kafka.options import (
    CommitOptions,
    ConnectionOptions,
    ErrorOptions,
    InputOptions,
    KafkaOptions,
    OutputOptions,
    RetryOptions,
    SecurityOptions,
    TransactionOptions,
)

__all__ = [
    "CommitOptions", "ConnectionOptions", "ErrorOptions", "InputOptions", "KafkaOptions", "OutputOptions", "RetryOptions",
    "SecurityOptions", "TransactionOptions",
]  # fmt: skip
