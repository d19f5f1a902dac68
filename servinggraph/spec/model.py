"""The pydantic models of a graph definition. What a step or router kind adds stands in its own options."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from servinggraph.interfaces import BatchPolicy, CachePolicy, Options, SequencePolicy
from servinggraph.kafka import KafkaOptions
from servinggraph.policies import Guards
from servinggraph.tensors import DATATYPES, TensorSpec

__all__ = ["COMMON_KEYS", "GraphSpec", "NodeSpec", "Rename", "TensorModel", "name_problem"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_NODE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BF16", "BYTES",
]  # fmt: skip
assert set(Datatype.__args__) == set(DATATYPES)  # type: ignore[attr-defined]  # a Literal cannot be built from the table


class TensorModel(Options):
    """A declared tensor."""

    datatype: Datatype = Field(description="V2 datatype.")
    shape: list[int] = Field(description="Size of each axis; -1 is any size.")
    optional: bool = Field(False, description="True when a request may leave the input out.")
    labels: str | None = Field(
        None,
        description="File with the names of an output's classes, one a line, for the `classification` parameter; "
        "a relative path starts from the graph file.",
    )

    @field_validator("shape")
    @classmethod
    def _sizes(cls, shape: list[int]) -> list[int]:
        if any(size < -1 for size in shape):
            raise ValueError(f"each size is -1 (any) or 0 and more, got {shape}")
        return shape

    def spec(self) -> TensorSpec:
        """Return the same as a kernel value."""
        return TensorSpec(self.datatype, tuple(self.shape), self.optional)


class Rename(Options):
    """Other names for tensors on their way into and out of a node, each `old: new`."""

    inputs: dict[str, str] = Field(default_factory=dict, description="Name before the node: name that the node knows.")
    outputs: dict[str, str] = Field(default_factory=dict, description="Name that the node gives: name behind it.")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for side in (self.inputs, self.outputs):
            if len(set(side.values())) != len(side):
                raise ValueError(f"two tensors get the same new name in {side}")
        return self


class NodeSpec(Guards):
    """One node or branch: what every kind has, and in `model_extra` what its kind adds."""

    model_config = ConfigDict(extra="allow")

    step: str | None = Field(None, description="Kind of step.")
    router: str | None = Field(None, description="Kind of router.")
    after: str | list[str] | None = Field(
        None, description="Nodes whose results this one takes, or `inputs`; by default the node above."
    )
    rename: Rename | None = Field(None, description="Other names for tensors around this node.")
    keep: list[str] | Literal["all"] | None = Field(
        None, description="Tensors that go past this node and join its outputs; `all` for each that it gets."
    )
    outputs: dict[str, TensorModel] | None = Field(
        None, description="Tensors that the node gives, where the kind cannot know them; checked at run time."
    )
    timeout_ms: float | None = Field(None, gt=0, description="Longest time for this node, its queue included.")
    batch: BatchPolicy | bool | None = Field(
        None, description="Batch requests for this node: `true` for the defaults, `false` for never."
    )
    pure: bool = Field(
        False, description="Promise that equal values get equal answers, and that nothing else depends on the node's running."
    )
    cache: CachePolicy | None = Field(
        None, description="Keep the node's answers and give them again; for nodes with `pure: true`."
    )
    branches: dict[str, NodeSpec] | None = Field(None, description="Branches of a router, by name.")

    @property
    def guards(self) -> Guards | None:
        """Its guards; None without any."""
        return Guards(**{key: getattr(self, key) for key in Guards.model_fields}) if self.is_needed else None

    @property
    def extra(self) -> dict[str, Any]:
        """The keys that belong to the kind."""
        return dict(self.model_extra or {})

    @property
    def predecessors(self) -> list[str] | None:
        """`after` as a list; None when it is not given."""
        return [self.after] if isinstance(self.after, str) else self.after


COMMON_KEYS = tuple(NodeSpec.model_fields)


class GraphSpec(Options):
    """A whole graph."""

    graph: str = Field(description="Name of the graph: the V2 model name.")
    version: str = Field("1", description="Version, a positive integer.")
    description: str | None = Field(None, description="A sentence for whoever reads the file.")
    inputs: dict[str, TensorModel] | Literal["body"] = Field(
        description="Tensors that a request brings; or `body`: one free-form value, a JSON document, text or bytes, say."
    )
    outputs: dict[str, TensorModel] | None = Field(
        None, description="Tensors of the answer, where the last node does not say them itself."
    )
    nodes: dict[str, NodeSpec] = Field(description="The nodes, in order.")
    answer: str | None = Field(None, description="Node whose result is the answer.")
    timeout_ms: float | None = Field(None, gt=0, description="Longest time for a request; a caller may ask for less.")
    batch: BatchPolicy | None = Field(
        None, description="Batch whole requests: the graph then runs once for a batch of rows, contexts apart."
    )
    sequences: SequencePolicy | None = Field(
        None, description="Requests belong to sequences, for which steps keep state; `{}` for the defaults."
    )
    cache: CachePolicy | None = Field(
        None, description="Keep the graph's answers and give them again; for graphs whose nodes all say `pure: true`."
    )
    kafka: KafkaOptions | None = Field(
        None, description="Topics that bring requests and take answers, beside HTTP and gRPC or alone."
    )

    @property
    def tensors(self) -> dict[str, TensorModel]:
        """The declared inputs; none where a request brings a body."""
        return {} if self.inputs == "body" else self.inputs

    @field_validator("version", mode="before")
    @classmethod
    def _number_as_text(cls, version: object) -> object:
        # `version: 3` is what people write; a bool is an int in Python but no version.
        text = str(version) if isinstance(version, int) and not isinstance(version, bool) else version
        if not isinstance(text, str) or not re.fullmatch(r"[1-9][0-9]*", text):
            raise ValueError(f"a version is a positive integer, got {version!r}")
        return text


def name_problem(name: str, what: str) -> str | None:
    """Say why a name cannot stand in a URL and in a dotted path; None when it can.

    Args:
        name: the name.
        what: "graph", "node" or "branch". A dot is allowed in a graph's name only, because
            `score.gbm` means branch gbm of node score.
    """
    pattern = _NAME if what == "graph" else _NODE_NAME
    if not pattern.fullmatch(name):
        allowed = "letters, digits, '_', '-'" + (" and '.'" if what == "graph" else "")
        return f"{what} name '{name}' is not URL-safe: use {allowed}, beginning with a letter, digit or '_'"
    if what == "node" and name == "inputs":
        return "a node cannot be called 'inputs': that name stands for the graph's inputs"
    return None
