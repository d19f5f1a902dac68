"""Requests and responses of a graph, independent of the wire they came over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from servinggraph.context import ParameterValue
from servinggraph.tensors import Array

__all__ = ["Body", "Destination", "InferenceRequest", "InferenceResponse", "RequestedOutput"]


class Body:
    """A free-form value, beside tensors: what a graph with `inputs: body` takes and gives.

    A step returns `Body(picture, "image/png")` to answer with content of a type of its own.

    Attributes:
        value: any Python object; `bytes` or `str` where a content type is given by a step.
        content_type: media type of the content; empty where the value is to be encoded as the
            caller asks.
    """

    __slots__ = ("content_type", "value")

    def __init__(self, value: Any, content_type: str = "") -> None:
        self.value = value
        self.content_type = content_type

    def __repr__(self) -> str:
        return f"Body({type(self.value).__name__}{f', {self.content_type!r}' if self.content_type else ''})"


class Destination(Protocol):
    """A part of a shared memory region that an output is written into.

    Attributes:
        region: name of the region.
        offset: where in the region it begins.
        byte_size: its length.
    """

    region: str
    offset: int
    byte_size: int

    def write(self, data: memoryview | bytes) -> None:
        """Write at its beginning; `data` has at most `byte_size` bytes."""
        ...


class RequestedOutput:
    """One entry of a request's `outputs`.

    Attributes:
        name: name of the output tensor.
        binary: True or False where the request says how to send it, None where it does not.
        parameters: the entry's parameters as they came.
        memory: where in shared memory its data goes; None when it is sent.
        classify: makes classes of it, given whether its first axis is the batch; None when it is
            wanted as it is.
    """

    __slots__ = ("binary", "classify", "memory", "name", "parameters")

    def __init__(
        self, name: str, binary: bool | None, parameters: Mapping[str, Any], memory: Destination | None = None
    ) -> None:
        self.name = name
        self.binary = binary
        self.parameters = parameters
        self.memory = memory
        self.classify: Callable[[Array, bool], Array] | None = None


class InferenceRequest:
    """A decoded inference request.

    Attributes:
        inputs: tensor name to array; read-only views of the body where the wire was binary. For
            a graph with `inputs: body` a `Body`.
        id: the caller's request id, empty when none was given.
        parameters: request-level parameters.
        outputs: the outputs that were asked for, in order; empty means all.
        binary: True when outputs that are not listed are wanted as binary data.
    """

    __slots__ = ("binary", "id", "inputs", "outputs", "parameters")

    def __init__(
        self,
        inputs: dict[str, Array],
        id: str = "",
        parameters: Mapping[str, ParameterValue] | None = None,
        outputs: tuple[RequestedOutput, ...] = (),
        binary: bool = False,
    ) -> None:
        self.inputs = inputs
        self.id = id
        self.parameters: Mapping[str, ParameterValue] = {} if parameters is None else parameters
        self.outputs = outputs
        self.binary = binary


class InferenceResponse:
    """The answer to an inference request.

    Attributes:
        model: name of the graph.
        version: its version, always concrete.
        outputs: tensor name to array. Of a graph with `inputs: body` a `Body`.
        id: the request's id.
        parameters: response-level parameters that steps or routers have set.
        batched: True when the first axis of every tensor is the batch.
    """

    __slots__ = ("batched", "id", "model", "outputs", "parameters", "version")

    def __init__(
        self,
        model: str,
        version: str,
        outputs: Mapping[str, Array],
        id: str = "",
        parameters: Mapping[str, ParameterValue] | None = None,
        batched: bool = False,
    ) -> None:
        self.model = model
        self.batched = batched
        self.version = version
        self.outputs = outputs
        self.id = id
        self.parameters: Mapping[str, ParameterValue] = {} if parameters is None else parameters

    def __repr__(self) -> str:
        tensors = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in self.outputs.items())
        return f"InferenceResponse({self.model} v{self.version}: {tensors})"
