"""servinggraph: multi-stage model serving as one compiled graph.

The public names are loaded when they are first used, so that `import servinggraph` costs
nothing and a step's module need not pay for the server.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from servinggraph.version import __version__

if TYPE_CHECKING:
    from servinggraph import routers as routers, steps as steps
    from servinggraph.builder import Graph as Graph, signature as signature
    from servinggraph.context import Context as Context
    from servinggraph.errors import InvalidRequest as InvalidRequest, ServingGraphError as ServingGraphError
    from servinggraph.interfaces import RowErrors as RowErrors
    from servinggraph.messages import Body as Body

_HOME = {
    "Body": "servinggraph.messages",
    "Context": "servinggraph.context",
    "Graph": "servinggraph.builder",
    "InvalidRequest": "servinggraph.errors",
    "RowErrors": "servinggraph.interfaces",
    "ServingGraphError": "servinggraph.errors",
    "routers": "servinggraph.routers",
    "signature": "servinggraph.builder",
    "steps": "servinggraph.steps",
}

__all__ = [
    "Body",
    "Context",
    "Graph",
    "InvalidRequest",
    "RowErrors",
    "ServingGraphError",
    "__version__",
    "routers",
    "signature",
    "steps",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'servinggraph' has no attribute '{name}'")
    module = import_module(home)
    value = module if home.endswith(f".{name}") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
