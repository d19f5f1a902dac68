"""The options of a gRPC server: sizes, limits, compression, keepalive, TLS."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from servinggraph.errors import ServingGraphError
from servinggraph.interfaces import FrontEndOptions
from servinggraph.protocols.protobuf.codec import MAX_MESSAGE_BYTES

__all__ = ["channel_options", "credentials"]

_LEVELS: Final = {"none": 0, "low": 1, "medium": 2, "high": 3}


def channel_options(options: FrontEndOptions) -> Sequence[tuple[str, Any]]:
    """Return gRPC's own names and values of the settings."""
    chosen: list[tuple[str, Any]] = [
        # Otherwise a second server could listen on the same port, and would get half of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", receive_limit(options.max_body_bytes)),
        ("grpc.max_concurrent_streams", options.grpc_max_connection_calls),
        ("grpc.default_compression_level", _LEVELS[options.grpc_compression]),
        ("grpc.keepalive_time_ms", options.grpc_keepalive_time_ms),
        ("grpc.keepalive_timeout_ms", options.grpc_keepalive_timeout_ms),
        ("grpc.keepalive_permit_without_calls", int(options.grpc_keepalive_without_calls)),
        ("grpc.http2.max_pings_without_data", options.grpc_max_pings_without_data),
        ("grpc.http2.min_ping_interval_without_data_ms", options.grpc_min_ping_interval_ms),
        ("grpc.http2.max_ping_strikes", options.grpc_max_ping_strikes),
    ]
    for name in ("age", "age_grace"):
        time_ms = getattr(options, f"grpc_max_connection_{name}_ms")
        if time_ms:
            chosen.append((f"grpc.max_connection_{name}_ms", time_ms))
    return chosen


def receive_limit(max_body_bytes: int) -> int:
    """Return the size above which gRPC itself refuses a message.

    It does so without reading it, but says only a number; up to twice the limit is let through to be
    refused with the limit's name.
    """
    return min(2 * max_body_bytes + 4096, MAX_MESSAGE_BYTES)


def credentials(options: FrontEndOptions) -> grpc.ServerCredentials | None:
    """Return what TLS needs, None where it is off.

    Raises:
        ServingGraphError: one file is named without the other, cannot be read, or does not fit.
    """
    cert, key, client_ca = options.grpc_tls_cert, options.grpc_tls_key, options.grpc_tls_client_ca
    if not (cert or key or client_ca):
        return None
    if not (cert and key):
        missing = "--grpc-tls-key" if cert else "--grpc-tls-cert"
        raise ServingGraphError(f"TLS for gRPC needs {missing}, too: a certificate and its private key, as PEM files")
    _check(cert, key, client_ca)
    pair = Path(key).read_bytes(), Path(cert).read_bytes()
    if not client_ca:
        return grpc.ssl_server_credentials([pair])
    return grpc.ssl_server_credentials([pair], Path(client_ca).read_bytes(), require_client_auth=True)


def _check(cert: str, key: str, client_ca: str) -> None:
    """Try the files with Python's own TLS, which can say what is wrong with them: gRPC only says that it cannot listen."""
    for option, path in (("cert", cert), ("key", key), ("client-ca", client_ca)):
        if path and not Path(path).is_file():
            raise ServingGraphError(f"--grpc-tls-{option}: there is no file '{path}'")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key, password="")  # else a key that has one is asked for
    except (OSError, ValueError) as error:
        text = (
            f"--grpc-tls-cert {cert} and --grpc-tls-key {key} are no certificate and its private key without a password, in PEM"
        )
        raise ServingGraphError(f"{text}: {error}") from None
    try:
        if client_ca:
            context.load_verify_locations(client_ca)
    except OSError as error:
        raise ServingGraphError(f"--grpc-tls-client-ca {client_ca} holds no certificate in PEM: {error}") from None
