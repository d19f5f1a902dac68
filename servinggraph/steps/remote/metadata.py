"""What a remote model says of its tensors, held against what the definition says of them."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import SHUT_RDWR, socket
from threading import Event, Timer
from typing import Any
from urllib.parse import quote

import orjson

from servinggraph.steps.remote.endpoints import Endpoint
from servinggraph.tensors import TensorSpec

__all__ = ["Mismatch", "NoMetadata", "compare", "fetch_metadata"]

_MOST_BYTES = 2**20


class NoMetadata(Exception):
    """The server cannot be asked now; says why."""


class Mismatch(Exception):
    """The model is not what the definition says; says what is wrong."""


def fetch_metadata(
    endpoint: Endpoint, model: str, version: str, headers: Mapping[str, str], timeout_s: float, tls_ca: str | None
) -> dict[str, Any]:
    """Ask a server for a model's metadata. Blocks: for the thread that loads a graph.

    Raises:
        NoMetadata: the server does not answer.
        Mismatch: it does, and has no such model.
    """
    fetch = _over_grpc if endpoint.protocol == "grpc" else _over_http
    return fetch(endpoint, model, version, headers, timeout_s, tls_ca)


def compare(metadata: Mapping[str, Any], inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
    """Hold declared tensors against a model's metadata.

    Raises:
        Mismatch: naming the first tensor that does not fit.
    """
    for side, declared in (("inputs", inputs), ("outputs", outputs)):
        try:
            known = {
                str(tensor["name"]): TensorSpec(str(tensor["datatype"]), tuple(int(size) for size in tensor["shape"]))
                for tensor in metadata.get(side, [])
            }
        except (KeyError, TypeError, ValueError) as error:
            raise NoMetadata(f"its metadata cannot be read: {type(error).__name__}: {error}") from error
        for name, spec in declared.items():
            if name not in known:
                if spec.optional:
                    continue
                raise Mismatch(f"it has no {side[:-1]} '{name}'; its {side} are {', '.join(known) or 'none'}")
            if reason := spec.conflict_with(known[name]):
                raise Mismatch(f"declared {side[:-1]} '{name}' does not fit: its {reason}")


def _over_http(
    endpoint: Endpoint, model: str, version: str, headers: Mapping[str, str], timeout_s: float, tls_ca: str | None
) -> dict[str, Any]:
    path = f"{endpoint.path}/v2/models/{quote(model, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")
    host = endpoint.host.strip("[]")
    # Neither proxies of the environment nor redirects: headers may be secret.
    connection = (
        HTTPSConnection(host, endpoint.port, timeout=timeout_s, context=ssl.create_default_context(cafile=tls_ca))
        if endpoint.tls
        else HTTPConnection(host, endpoint.port, timeout=timeout_s)
    )
    late = Event()
    end: Timer | None = None
    try:
        connection.connect()
        # The connection's own time limit is for each piece; a server may send one now and then for ever.
        end = Timer(timeout_s, _cut, [connection.sock, late])
        end.start()
        connection.request("GET", path, headers=dict(headers))
        with connection.getresponse() as answer:
            body = answer.read(_MOST_BYTES)
        if answer.status in (400, 404):
            raise Mismatch(f"it answered {answer.status}: {body[:500].decode('utf-8', 'replace')}")
        if answer.status != 200:
            raise NoMetadata(f"it answered {answer.status}: {body[:500].decode('utf-8', 'replace')}")
        document = orjson.loads(body)
    except (HTTPException, OSError, ValueError) as error:
        in_time = not late.is_set() and not isinstance(error, TimeoutError)
        reason = str(error) if in_time else f"not within {timeout_s * 1e3:g} ms (limit 'metadata_timeout_ms')"
        raise NoMetadata(reason) from error
    finally:
        if end is not None:
            end.cancel()
        connection.close()
    if not isinstance(document, dict):
        raise NoMetadata("its metadata is no JSON object")
    return document


def _cut(connected: socket, late: Event) -> None:
    late.set()
    with suppress(OSError):  # it has ended this moment
        connected.shutdown(SHUT_RDWR)


def _over_grpc(
    endpoint: Endpoint, model: str, version: str, headers: Mapping[str, str], timeout_s: float, tls_ca: str | None
) -> dict[str, Any]:
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    client: Any = InferenceServerClient(endpoint.target, ssl=endpoint.tls, root_certificates=tls_ca)
    try:
        lower = {name.lower(): value for name, value in headers.items()}
        answer = client.get_model_metadata(model, version, headers=lower, client_timeout=timeout_s)
    except InferenceServerException as error:
        if str(error.status()).endswith(("NOT_FOUND", "INVALID_ARGUMENT")):
            raise Mismatch(f"it answered {error.status()}: {error.message()}") from error
        raise NoMetadata(str(error.message())) from error
    finally:
        client.close()
    return {
        side: [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in tensors]
        for side, tensors in (("inputs", answer.inputs), ("outputs", answer.outputs))
    }
