"""V2 over HTTP to one server.

Bodies are Triton's client's, connections are not: its own asynchronous client reads answers of any size, and does not say
whether a request that failed was sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from servinggraph.steps.remote.calls import Call, plain_bytes, sendable
from servinggraph.steps.remote.endpoints import Endpoint
from servinggraph.steps.remote.failures import garbage, refused
from servinggraph.steps.remote.http import HttpAnswer, HttpClient
from servinggraph.tensors import Array

__all__ = ["HttpTransport"]


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
        self._infer_url = f"{endpoint.url}/v2/{place}/infer"
        self._ready_url = f"{endpoint.url}/v2/health/ready"

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
        outputs = result.get_response()["outputs"]
        with np.errstate(over="ignore"):  # which `_tensor` finds out
            return {output["name"]: _tensor(output, result.as_numpy(output["name"])) for output in outputs}
    except Exception as error:  # whatever Triton's client stumbles over is no V2 answer
        raise garbage(where, f"it is no V2 answer: {type(error).__name__}: {error}") from error


def _tensor(output: Mapping[str, Any], array: Array) -> Array:
    """Return a tensor of an answer, once it is seen to be what the answer says.

    Raises:
        ValueError: it is not: numbers in JSON were cut off to fit, or the shape has other sizes.
    """
    name, datatype = output["name"], output["datatype"]
    if list(array.shape) != list(output["shape"]):
        raise ValueError(f"tensor '{name}' has the shape {output['shape']}, which no tensor has")
    if "data" in output and array.dtype.kind in "biuf":
        # Triton's client casts without a word.
        sent = np.asarray(output["data"], dtype="f8" if array.dtype.kind == "f" else None).reshape(array.shape)
        fits = np.isinf(sent) == np.isinf(array) if array.dtype.kind == "f" else sent == array
        if not fits.all():
            raise ValueError(f"tensor '{name}' has values that {datatype} cannot hold")
    return plain_bytes(array)


def _error_text(body: bytes) -> str:
    try:
        document: Any = orjson.loads(body)
        return str(document["error"])
    except (ValueError, KeyError, TypeError):
        return body[:2000].decode("utf-8", "replace")
