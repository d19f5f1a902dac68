"""The compiled form of a graph: nodes in order with their steps, routers and known signatures.

Plain data, made by the compiler, run by the executor. Nothing here runs anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from servinggraph.interfaces import BatchPolicy, CachePolicy, Router, SequencePolicy, Step
from servinggraph.kafka import KafkaOptions
from servinggraph.policies import Guards
from servinggraph.tensors import Signature, TensorSpec

__all__ = ["INPUTS", "Plan", "PlanNode"]

INPUTS = "inputs"
"""Stands for the request's tensors where a node is named."""


@dataclass(frozen=True, slots=True)
class PlanNode:
    """One node or branch.

    Attributes:
        name: `score`, or `score.gbm` for a branch.
        kind: kind of its step or router, for people.
        work: the step or router itself.
        branches: a router's branches by their short names.
        sources: nodes whose results it takes; `inputs` for the request's tensors.
        renamed_inputs: tensor name before the node to the name that the node knows.
        renamed_outputs: tensor name that the node gives to the name behind it.
        keep: tensors that go past the node; "all" for each that it gets; None for none.
        timeout_s: longest time for this node; None without a limit.
        batch: what the graph says of batching; None when it is silent.
        joined: policy of the queue of the router around it, in which its requests have waited; then it has none
            of its own. None where it has to see to that itself.
        cache: how its answers are kept; None when they are not.
        guards: retries, circuit breaker, rate limit, places; None without any.
        outputs: declared outputs, checked on every answer; None when nothing is declared.
        signature: what it takes and gives as far as known, names as outside the node.
        streams: True when it gives any number of values, one after the other: a generator.
        graph: the graph that it stands for, its nodes named `score.clean`; None for most.
    """

    name: str
    kind: str
    work: Step[object] | Router[object]  # type: ignore[type-var]  # options of any kind
    branches: Mapping[str, PlanNode] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    renamed_inputs: Mapping[str, str] = field(default_factory=dict)
    renamed_outputs: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] | str | None = None
    timeout_s: float | None = None
    batch: BatchPolicy | bool | None = None
    joined: BatchPolicy | None = None
    cache: CachePolicy | None = None
    guards: Guards | None = None
    outputs: Mapping[str, TensorSpec] | None = None
    signature: Signature = field(default_factory=Signature)
    streams: bool = False
    graph: Plan | None = None

    @property
    def inside(self) -> tuple[PlanNode, ...]:
        """The nodes in it: a router's branches, or those of the graph that it stands for."""
        return (*self.branches.values(), *(self.graph.nodes if self.graph is not None else ()))


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole compiled graph.

    Attributes:
        name: the V2 model name.
        version: positive integer as text.
        inputs: declared input tensors; none when a request brings a body.
        outputs: tensors of the answer as far as known; None when they are not.
        nodes: in an order in which every node comes after its sources.
        answer: name of the node whose result is the answer.
        timeout_s: longest time for a request; None without a limit.
        batch: policy for batching whole requests, None for none.
        cache: how its answers are kept; None when they are not.
        source: file the graph came from; None when it was built in Python.
        body: True when a request brings one free-form value instead of tensors.
        body_keys: what the first nodes look up by name in that value, which then has to be a
            mapping; None when they take it whole.
        sequences: how requests form sequences, None where they do not.
        kafka: topics that bring requests and take answers; None without any.
    """

    name: str
    version: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec] | None
    nodes: tuple[PlanNode, ...]
    answer: str
    timeout_s: float | None = None
    batch: BatchPolicy | None = None
    cache: CachePolicy | None = None
    source: str | None = None
    body: bool = False
    body_keys: Mapping[str, TensorSpec] | None = None
    sequences: SequencePolicy | None = None
    kafka: KafkaOptions | None = None

    @property
    def decoupled(self) -> bool:
        """True when a request may have any number of answers, because a node is a generator."""
        return any(node.streams for node in self.nodes)

    @property
    def routes(self) -> bool:
        """True when a router chooses by the route in a request's URL."""
        return any(isinstance(node.work, Router) and node.work.routes for node in self.every_node())

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions that requests may ask for: those that a router takes apart, else the graph's own."""
        routers = [node.work for node in self.every_node() if isinstance(node.work, Router)]
        versions = {version for router in routers for version in router.versions}
        return tuple(sorted(versions or {self.version}, key=int))

    def every_node(self) -> list[PlanNode]:
        """Return all nodes, branches of routers and nodes of graphs in graphs included, parents first."""
        found: list[PlanNode] = []
        waiting = list(reversed(self.nodes))
        while waiting:
            node = waiting.pop()
            found.append(node)
            waiting.extend(reversed(node.inside))
        return found
