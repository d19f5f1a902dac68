"""Kinds of steps, routers and protocols by name, as import strings that are followed only when used.

Another package adds its own by an entry point in the group `servinggraph.steps`,
`servinggraph.routers` or `servinggraph.protocols`: `my_kind = "package.module:Class"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Final

from servinggraph.importing import ImportProblem, load_object

__all__ = ["PROTOCOLS", "ROUTERS", "STEPS", "kinds", "load_kind"]

STEPS: Final[Mapping[str, str]] = {
    "callback": "servinggraph.steps.sinks:Callback",
    "graph": "servinggraph.steps.graph:SubGraph",
    "jsonl": "servinggraph.steps.sinks:Jsonl",
    "onnx": "servinggraph.steps.onnx:Onnx",
    "publish": "servinggraph.steps.topics:Publish",
    "python": "servinggraph.steps.python:Python",
    "queue": "servinggraph.steps.topics:Queue",
    "rest": "servinggraph.steps.remote:Rest",
    "v2": "servinggraph.steps.remote:V2",
}
ROUTERS: Final[Mapping[str, str]] = {
    "ab": "servinggraph.routers.ab:Ab",
    "bandit": "servinggraph.routers.bandit:Bandit",
    "canary": "servinggraph.routers.canary:Canary",
    "choice": "servinggraph.routers.choice:Choice",
    "cycle": "servinggraph.routers.cycle:Cycle",
    "fallback": "servinggraph.routers.fallback:Fallback",
    "filter": "servinggraph.routers.filter:Filter",
    "map": "servinggraph.routers.map:Map",
    "model": "servinggraph.routers.model:Model",
    "chain": "servinggraph.routers.chain:Chain",
    "champion": "servinggraph.routers.champion:Champion",
    "ensemble": "servinggraph.routers.ensemble:Ensemble",
}
PROTOCOLS: Final[Mapping[str, str]] = {
    "grpc": "servinggraph.protocols.grpc.server:GrpcFrontEnd",
    "http": "servinggraph.protocols.http.server:HttpFrontEnd",
    "kafka": "servinggraph.protocols.kafka.server:KafkaFrontEnd",
    "metrics": "servinggraph.protocols.http.server:MetricsFrontEnd",
}

_EXTRAS: Final = {"onnx": "onnx", "grpc": "grpc", "publish": "kafka", "queue": "kafka", "kafka": "kafka"}
"""Kinds whose packages do not come with the base installation, and the extra that brings them."""

_TABLES: Final = {"steps": STEPS, "routers": ROUTERS, "protocols": PROTOCOLS}


@cache
def kinds(group: str) -> Mapping[str, str]:
    """Return name to import string of a group: "steps", "routers" or "protocols".

    Our own come first: another package cannot replace them by accident.
    """
    found = {point.name: point.value for point in entry_points(group=f"servinggraph.{group}")}
    return found | dict(_TABLES[group])


@cache
def load_kind(group: str, name: str) -> Any:
    """Return the class behind a kind.

    Raises:
        KeyError: there is no such kind.
        ImportProblem: its module cannot be imported; for an extra that is not installed the
            text names what is missing.
    """
    try:
        return load_object(kinds(group)[name])
    except ImportProblem as error:
        if name in _EXTRAS and isinstance(error.__cause__, ModuleNotFoundError):
            raise ImportProblem(f"{error}: pip install 'servinggraph[{_EXTRAS[name]}]'") from error
        raise
