"""A JSON Schema of graph files, for completion and checks in editors."""

from __future__ import annotations

from typing import Any

from servinggraph.importing import ImportProblem
from servinggraph.registry import kinds, load_kind
from servinggraph.spec import GraphSpec, NodeSpec

__all__ = ["json_schema"]


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a graph file, with every kind that is installed.

    A kind whose package is missing is left out: its keys cannot be known here.
    """
    schema = GraphSpec.model_json_schema(ref_template="#/$defs/{model}")
    definitions = schema.setdefault("$defs", {})
    common = definitions.pop("NodeSpec")
    alternatives = []
    for group, key in (("steps", "step"), ("routers", "router")):
        for kind in kinds(group):
            try:
                options = load_kind(group, kind).options_type
            except ImportProblem:
                continue
            own = options.model_json_schema(ref_template="#/$defs/{model}")
            definitions.update(own.pop("$defs", {}))
            properties = {name: value for name, value in common["properties"].items() if name not in ("step", "router")}
            if key == "step":
                properties.pop("branches")
            properties |= own.get("properties", {})
            properties[key] = {"const": kind, "description": (options.__doc__ or kind).strip().splitlines()[0]}
            required = [key, *own.get("required", []), *(["branches"] if key == "router" else [])]
            definitions[f"{key}-{kind}"] = {
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": False,
            }
            alternatives.append({"$ref": f"#/$defs/{key}-{kind}"})
    definitions[NodeSpec.__name__] = {"oneOf": alternatives}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "servinggraph graph", **schema}
