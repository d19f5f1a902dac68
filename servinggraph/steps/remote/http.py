"""HTTP to other servers: one pool of connections, answers of bounded size, failures told apart; V2 over it.

Bodies are Triton's client's, connections aiohttp's: Triton's own asynchronous client reads answers of any size, and does
not say whether a request that failed was sent.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp
import orjson
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from yarl import URL

from servinggraph.steps.remote.calls import Call, plain_bytes, sendable
from servinggraph.steps.remote.endpoints import Endpoint
from servinggraph.steps.remote.failures import broken, garbage, refused, unreachable
from servinggraph.tensors import Array

__all__ = ["HttpAnswer", "HttpClient", "HttpTransport"]


class HttpAnswer(NamedTuple):
    """An answer."""

    status: int
    """Status code."""
    headers: Mapping[str, str]
    """Headers; names in any case find them."""
    body: bytes
    """The whole body."""


class HttpClient:
    """A pool of connections. To be made on the event loop.

    Args:
        connections: most connections; more calls wait for one.
        connect_timeout_s: longest time to make one.
        max_bytes: largest body of an answer.
        tls_ca: file with the root certificates (PEM) to trust; the system's by default.
    """

    def __init__(self, connections: int, connect_timeout_s: float, max_bytes: int, tls_ca: str | None = None) -> None:
        trusted = ssl.create_default_context(cafile=tls_ca) if tls_ca else True
        self._max_bytes = max_bytes
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ssl=trusted),
            # Deadlines are the executor's; it cancels.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity", "User-Agent": "servinggraph"},
            auto_decompress=False,
        )

    async def call(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, where: str) -> HttpAnswer:
        """Send a request and read the answer.

        Args:
            method: the method.
            url: the URL, encoded.
            headers: headers of the request.
            body: its body.
            where: how errors name the server.

        Raises:
            CallFailed: there is no answer, or it is too large.
        """
        try:
            async with self._session.request(
                method, URL(url, encoded=True), headers=headers, data=body, allow_redirects=False
            ) as answer:
                return HttpAnswer(answer.status, answer.headers, await self._body(answer, where))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            raise unreachable(where, _reason(error)) from error
        except aiohttp.ClientPayloadError as error:
            raise broken(where, "in the middle of its answer") from error
        except aiohttp.ClientResponseError as error:
            raise garbage(where, error.message) from error
        except (aiohttp.ClientError, OSError) as error:
            raise broken(where, _reason(error)) from error

    async def _body(self, answer: aiohttp.ClientResponse, where: str) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in answer.content.iter_any():
            size += len(part)
            if size > self._max_bytes:
                answer.close()  # the rest is not wanted
                raise garbage(where, f"it is larger than {self._max_bytes} bytes (limit 'max_response_bytes')")
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


class HttpTransport:
    """V2 over HTTP to one server.

    Args:
        endpoint: the server.
        model: name of the model.
        version: its version; empty for the server's choice.
        client: the pool; closed with this.
        headers: headers of each request.
    """

    def __init__(self, endpoint: Endpoint, model: str, version: str, client: HttpClient, headers: Mapping[str, str]) -> None:
        self._where = str(endpoint)
        self._client = client
        self._headers = headers
        place = f"models/{quote(model, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")
        self._infer_url = f"{endpoint}/v2/{place}/infer"
        self._ready_url = f"{endpoint}/v2/health/ready"

    async def infer(self, call: Call) -> dict[str, Array]:
        body, length = _encoded(call)
        headers = {**call.headers, **self._headers, "Content-Type": "application/octet-stream"}
        if length is None:
            headers["Content-Type"] = "application/json"
        else:
            headers["Inference-Header-Content-Length"] = str(length)
        if call.left_s is not None:
            headers["X-Request-Timeout-Ms"] = f"{call.left_s * 1e3:.3f}"
        answer = await self._client.call("POST", self._infer_url, headers, body, self._where)
        if answer.status != 200:
            raise refused(self._where, answer.status, _error_text(answer.body))
        return _decoded(answer, self._where)

    async def ready(self) -> bool:
        answer = await self._client.call("GET", self._ready_url, self._headers, None, self._where)
        return answer.status == 200

    async def close(self) -> None:
        await self._client.close()


def _encoded(call: Call) -> tuple[bytes, int | None]:
    inputs = []
    for name, value in call.inputs.items():
        array, datatype = sendable(name, value)
        inputs.append(InferInput(name, list(array.shape), datatype).set_data_from_numpy(array))
    body, length = InferenceServerClient.generate_request_body(
        inputs,
        outputs=[InferRequestedOutput(name) for name in call.outputs] or None,
        request_id=call.id,
        timeout=None if call.left_s is None else max(1, int(call.left_s * 1e6)),
        parameters=dict(call.parameters) or None,
    )
    return body, length


def _decoded(answer: HttpAnswer, where: str) -> dict[str, Array]:
    try:
        length = answer.headers.get("Inference-Header-Content-Length")
        result = InferenceServerClient.parse_response_body(answer.body, header_length=length)
        names = [output["name"] for output in result.get_response()["outputs"]]
        return {name: plain_bytes(result.as_numpy(name)) for name in names}
    except Exception as error:  # whatever Triton's client stumbles over is no V2 answer
        raise garbage(where, f"it is no V2 answer: {type(error).__name__}: {error}") from error


def _error_text(body: bytes) -> str:
    try:
        document: Any = orjson.loads(body)
        return str(document["error"])
    except (ValueError, KeyError, TypeError):
        return body[:2000].decode("utf-8", "replace")


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or str(error.os_error)
    return str(error) or type(error).__name__
