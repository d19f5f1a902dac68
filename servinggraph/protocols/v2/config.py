"""A graph, or one of its nodes, in the shape of Triton's ModelConfig, as far as its terms have a meaning here.

A graph counts as batched when the first axis of all its inputs and outputs is free and some
node, or the graph, is batched: `max_batch_size` is then the largest number of rows that runs
at once, and `dims` are without that axis, as clients expect; the metadata always have it. A
larger request is no error, it runs in pieces. Source: Triton, model_config.proto.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from servinggraph.errors import GraphNotFound
from servinggraph.interfaces import BatchPolicy, Step
from servinggraph.lifecycle import Catalog, ServedGraph
from servinggraph.plan import INPUTS, Plan, PlanNode
from servinggraph.protocols.v2.metadata import PLATFORM
from servinggraph.tensors import TensorSpec

__all__ = ["model_config"]

_TYPES: Final = {"BYTES": "TYPE_STRING"}
_MICROSECONDS: Final = 1000


def model_config(catalog: Catalog, name: str, version: str = "") -> dict[str, Any]:
    """Return the configuration of a graph, or of a node as `graph.node`.

    Args:
        catalog: what is served.
        name: the graph, or the node. Clients look nodes up that an ensemble's configuration names.
        version: the graph's version; empty for the highest that is ready.

    Returns:
        What is sent as JSON; the same keys and values as the protobuf message has.

    Raises:
        GraphNotFound: there is no such graph, version or node.
        Unavailable: it is there, but not ready.
    """
    try:
        graph = catalog.get(name, version)
    except GraphNotFound:
        # Names of nodes have no dot unless they are branches, names of graphs may have several.
        for owner in {graph.plan.name for graph in catalog.graphs() if name.startswith(f"{graph.plan.name}.")}:
            graph = catalog.get(owner, version)
            for node in graph.plan.every_node():
                if name == f"{owner}.{node.name}":
                    return _of_node(graph, node)
        raise
    plan = graph.plan
    parts = {"version_policy": _version_policy(catalog.policies.get(plan.name, 1)), **_of_graph(graph)}
    return _document(plan.name, plan.inputs, plan.outputs or {}, graph.executor.max_rows, parts)


def _version_policy(policy: int | str | tuple[int, ...]) -> dict[str, Any]:
    if isinstance(policy, int):
        return {"latest": {"num_versions": policy}}
    return {"all": {}} if isinstance(policy, str) else {"specific": {"versions": list(policy)}}


def _of_node(graph: ServedGraph, found: PlanNode) -> dict[str, Any]:
    inputs, outputs = _known(found.signature.inputs), _known(found.signature.outputs)
    batcher = graph.executor.batchers.get(found.name)
    rows = batcher.policy.max_rows if batcher is not None and _first_axes_are_free({**inputs, **outputs}) else 0
    parts: dict[str, Any] = {"instance_group": _instances(found, None if batcher is None else batcher.policy)}
    if batcher is not None:
        parts["dynamic_batching"] = _dynamic_batching(batcher.policy)
    parts["response_cache"] = {"enable": found.cache is not None}
    parts["model_transaction_policy"] = {"decoupled": found.streams}
    return _document(f"{graph.plan.name}.{found.name}", inputs, outputs, rows, parts)


def _document(
    name: str, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec], rows: int, parts: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "platform": PLATFORM,
        "backend": "",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": rows,
        "input": [
            {
                **_tensor(tensor, spec, batched=rows > 0),
                "format": "FORMAT_NONE",
                "allow_ragged_batch": False,
                "optional": spec.optional,
            }
            for tensor, spec in inputs.items()
            if _is_known(spec)
        ],
        "output": [
            {**_tensor(tensor, spec, batched=rows > 0), "label_filename": "" if spec.labels is None else spec.labels.file}
            for tensor, spec in outputs.items()
            if _is_known(spec)
        ],
        "batch_input": [],
        "batch_output": [],
        "default_model_filename": "",
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {},
        "model_warmup": [],
        **parts,
    }


def _of_graph(graph: ServedGraph) -> dict[str, Any]:
    """Return what a graph's configuration has besides names and tensors."""
    plan, batchers = graph.plan, graph.executor.batchers
    parts: dict[str, Any] = {
        "model_transaction_policy": {"decoupled": plan.decoupled},
        "response_cache": {"enable": plan.cache is not None or any(node.cache is not None for node in plan.every_node())},
    }
    if plan.timeout_s is not None:
        parts["parameters"] = {"timeout_ms": {"string_value": f"{plan.timeout_s * 1e3:g}"}}
    # Only one of these three can be said, in protobuf as in JSON.
    alone = batchers.get("") or (batchers.get(plan.nodes[0].name) if len(plan.nodes) == 1 else None)
    steps = _ensemble_steps(plan) if len(plan.nodes) > 1 and alone is None else None
    if plan.sequences is not None:
        parts["sequence_batching"] = {
            "max_sequence_idle_microseconds": round(plan.sequences.idle_ms * _MICROSECONDS),
            "oldest": {"max_candidate_sequences": plan.sequences.max},
        }
    elif alone is not None:
        parts["dynamic_batching"] = _dynamic_batching(alone.policy)
    elif steps is not None:
        parts["ensemble_scheduling"] = {"step": steps}
        return parts
    parts["instance_group"] = _instances(
        plan.nodes[0] if len(plan.nodes) == 1 else None, None if alone is None else alone.policy
    )
    return parts


def _tensor(name: str, spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    shape = spec.shape or ()
    datatype = spec.datatype or ""
    return {
        "name": name,
        "data_type": _TYPES.get(datatype, f"TYPE_{datatype}"),
        "dims": list(shape[1:] if batched else shape),
        "is_shape_tensor": False,
        "is_non_linear_format_io": False,
    }


def _dynamic_batching(policy: BatchPolicy) -> dict[str, Any]:
    levels = policy.priorities if policy.priorities > 1 else 0
    return {
        "preferred_batch_size": list(policy.preferred_rows or [policy.max_rows]),
        "max_queue_delay_microseconds": round(policy.max_delay_ms * _MICROSECONDS),
        "preserve_ordering": False,
        "priority_levels": levels,
        "default_priority_level": (policy.default_priority or levels) if levels else 0,
        "default_queue_policy": {
            "timeout_action": "DELAY" if policy.on_timeout == "continue" else "REJECT",
            "default_timeout_microseconds": round((policy.queue_timeout_ms or 0) * _MICROSECONDS),
            "allow_timeout_override": True,
            "max_queue_size": policy.max_queue,
        },
        "priority_queue_policy": {},
    }


def _instances(node: PlanNode | None, policy: BatchPolicy | None) -> list[dict[str, Any]]:
    """Return how many runs there may be at once, and where."""
    work = None if node is None else node.work
    device = str(getattr(work.options, "device", "cpu")) if isinstance(work, Step) else "cpu"
    kind, _, number = device.partition(":")
    kinds = {"cuda": "KIND_GPU", "tensorrt": "KIND_GPU", "auto": "KIND_AUTO"}
    return [
        {
            "name": "",
            "kind": kinds.get(kind, "KIND_CPU"),
            "count": policy.instances if policy is not None else 1,
            "gpus": [int(number or 0)] if kinds.get(kind) == "KIND_GPU" else [],
        }
    ]


def _ensemble_steps(plan: Plan) -> list[dict[str, Any]] | None:
    """Return the graph's nodes as steps of an ensemble; None where some node's tensors are not known.

    A tensor between nodes is called `node.tensor`; those of the request and the answer keep their names.
    """
    if set(plan.inputs) & set(plan.outputs or {}):  # an ensemble's tensors have one maker each
        return None
    behind: dict[str, Mapping[str, TensorSpec]] = {INPUTS: plan.inputs}
    steps = []
    for node in plan.nodes:
        reach = {tensor: source for source in node.sources for tensor in behind[source]}
        takes, gives = node.signature.inputs, node.signature.outputs
        if gives is None:
            return None
        names = [name for name in reach if takes is None or name in takes]
        behind[node.name] = gives
        steps.append(
            {
                "model_name": f"{plan.name}.{node.name}",
                "model_version": -1,
                "input_map": {name: _between(reach[name], name) for name in names},
                "output_map": {name: _behind(plan, node.name, name) for name in gives},
            }
        )
    return steps


def _between(source: str, tensor: str) -> str:
    return tensor if source == INPUTS else f"{source}.{tensor}"


def _behind(plan: Plan, node: str, tensor: str) -> str:
    return tensor if node == plan.answer and tensor in (plan.outputs or {}) else f"{node}.{tensor}"


def _known(tensors: Mapping[str, TensorSpec] | None) -> Mapping[str, TensorSpec]:
    return {name: spec for name, spec in (tensors or {}).items() if _is_known(spec)}


def _is_known(spec: TensorSpec) -> bool:
    return spec.datatype is not None and spec.shape is not None


def _first_axes_are_free(tensors: Mapping[str, TensorSpec]) -> bool:
    shapes: Sequence[Any] = [spec.shape for spec in tensors.values()]
    return bool(shapes) and all(shape and shape[0] == -1 for shape in shapes)
