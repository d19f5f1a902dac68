"""A V2 server somewhere, over HTTP or gRPC: what its models take, and one request to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import click

from servinggraph.cli.params import server_address
from servinggraph.tensors import Array, datatype_of

__all__ = ["Reply", "Target", "TensorMeta", "failure"]


@dataclass(frozen=True)
class TensorMeta:
    """A tensor as a model's metadata has it.

    Attributes:
        name: its name.
        datatype: V2 datatype.
        shape: its axes; -1 for one of any length.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Reply:
    """What a server answered.

    Attributes:
        outputs: tensors by name.
        parameters: the response's.
        model_version: version that answered.
        id: the request's id.
    """

    outputs: Mapping[str, Array]
    parameters: Mapping[str, Any]
    model_version: str
    id: str


def failure(error: BaseException) -> str:
    """Return what an error of a client library says, in one line."""
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    text = message() if callable(message) else str(error) or type(error).__name__
    code = status() if callable(status) else None
    return f"[{code}] {text}" if code else str(text)


class Target:
    """A server by its address, through Triton's client library.

    Args:
        url: http://host:port, https://host:port, grpc://host:port or grpcs://host:port.
        timeout_s: seconds to wait for an answer.

    Raises:
        click.UsageError: the address is none, or the client library is not installed.
    """

    def __init__(self, url: str, timeout_s: float = 30) -> None:
        parts = server_address(url if "://" in url else f"http://{url}", ("http", "https", "grpc", "grpcs"))
        self.is_grpc = parts.scheme.startswith("grpc")
        self.is_secure = parts.scheme in ("https", "grpcs")
        self.address = parts.netloc + ("" if self.is_grpc else parts.path.rstrip("/"))
        self.url = f"{'https' if self.is_secure else 'http'}://{self.address}"
        self.timeout_s = timeout_s
        self.library = _library("grpc" if self.is_grpc else "http")
        self._client: Any = None

    @property
    def client(self) -> Any:
        """The client, connected when it is first used."""
        if self._client is None:
            more = {} if self.is_grpc else {"connection_timeout": self.timeout_s, "network_timeout": self.timeout_s}
            self._client = self.library.InferenceServerClient(self.address, ssl=self.is_secure, **more)
        return self._client

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()

    def metadata(
        self, model: str, version: str, headers: Mapping[str, str] | None = None
    ) -> tuple[list[TensorMeta], list[TensorMeta]]:
        """Return the inputs and outputs of a model.

        Raises:
            ValueError: what the server says of it cannot be read.
        """
        # Its deadline: gRPC has none of its own.
        more: dict[str, Any] = {"as_json": True, "client_timeout": self.timeout_s} if self.is_grpc else {}
        found = self.client.get_model_metadata(model, version, headers=self.headers(headers), **more)
        try:
            return _tensors(found.get("inputs", [])), _tensors(found.get("outputs", []))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the model's metadata cannot be read: {type(error).__name__}: {error}") from error

    def infer(
        self,
        model: str,
        version: str,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] = (),
        id: str = "",
        parameters: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Ask once."""
        wanted = [self.library.InferRequestedOutput(name) for name in outputs]
        timing = {"client_timeout": self.timeout_s} if self.is_grpc else {}
        result = self.client.infer(
            model,
            self.tensors(inputs),
            model_version=version,
            outputs=wanted or None,
            request_id=id,
            headers=self.headers(headers),
            parameters=dict(parameters or {}),
            **timing,
        )
        document = result.get_response(as_json=True) if self.is_grpc else result.get_response()
        names = [output["name"] for output in document.get("outputs", [])]
        given = document.get("parameters", {})
        if self.is_grpc:
            given = {name: next(iter(value.values())) for name, value in given.items()}
        given.pop("binary_data_output", None)
        return Reply(
            {name: result.as_numpy(name) for name in names}, given, document.get("model_version", ""), document.get("id", "")
        )

    def headers(self, headers: Mapping[str, str] | None) -> dict[str, str]:
        """Return headers as the protocol takes them: names of metadata are in lower case, or gRPC refuses them."""
        return {name.lower() if self.is_grpc else name: value for name, value in (headers or {}).items()}

    def tensors(self, inputs: Mapping[str, Array], library: ModuleType | None = None) -> list[Any]:
        """Return arrays as the client library's inputs."""
        found = []
        for name, array in inputs.items():
            tensor = (library or self.library).InferInput(name, list(array.shape), datatype_of(array))
            tensor.set_data_from_numpy(array)
            found.append(tensor)
        return found


def _library(protocol: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(f"tritonclient.{protocol}")
    except ImportError as error:
        raise click.UsageError(f"{error}: this command needs pip install 'servinggraph[tools]'") from error


def _tensors(entries: Sequence[Mapping[str, Any]]) -> list[TensorMeta]:
    return [
        TensorMeta(entry["name"], entry["datatype"], tuple(int(axis) for axis in entry.get("shape", []))) for entry in entries
    ]
