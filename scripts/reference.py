"""Writes docs/reference.md and the table of docs/metrics.md from the code: `.venv/bin/python scripts/reference.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from servinggraph.interfaces import BatchPolicy, SequencePolicy
from servinggraph.kafka import KafkaOptions
from servinggraph.metrics import ALL
from servinggraph.registry import kinds, load_kind
from servinggraph.server import ServerOptions
from servinggraph.spec import GraphSpec, NodeSpec, Rename, TensorModel

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "reference.md"
METRICS = DOCS / "metrics.md"


_TABLE, _END = "<!-- table: scripts/reference.py -->", "<!-- end -->"


def table(model: Any) -> list[str]:
    """Return a Markdown table of a model's fields."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        if field.is_required():
            default = "required"
        elif field.default_factory is not None or field.default is None or field.default == "":
            default = ""
        else:
            default = f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{name}` | {default} | {meaning} |")
    return [*rows, ""]


def inner_models(annotation: Any) -> list[Any]:
    """Return the models that stand in a type: alone, or as items of lists, values of mappings, members of unions."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for part in get_args(annotation) for model in inner_models(part)]


def inner_tables(options: Any) -> list[str]:
    """Return the tables of the models that stand in a model's fields."""
    lines = []
    for name, field in options.model_fields.items():
        models = inner_models(field.annotation)
        for model in models:
            which = (
                "".join(f" with `watch: {kind}`" for kind in get_args(model.model_fields["watch"].annotation))
                if models[1:]
                else ""
            )
            lines += [f"`{name}`{which}:", "", *table(model)]
    return lines


def page() -> str:
    """Return the whole page."""
    lines = [
        "# Reference",
        "",
        "Made by `scripts/reference.py` from the descriptions in the code; a test keeps it fresh. For completion and",
        "checks in an editor use `servinggraph schema` (see the README).",
        "",
        "## Graph file",
        "",
        *table(GraphSpec),
        "A declared tensor, under `inputs` and `outputs`:",
        "",
        *table(TensorModel),
        "`${NAME}` or `${NAME:-default}` anywhere in a value is the environment variable NAME, `$$` a dollar sign; alone it",
        "takes the type of what it becomes, `max_rows: ${ROWS:-32}`. A variable without a default that is not set, or empty,",
        "is refused. Error texts name the reference and never the value, and `Graph.save` writes the reference.",
        "",
        "`--set a.b.c=value` on the command line replaces the value at that path.",
        "",
        "## Every node",
        "",
        *table(NodeSpec),
        "`rename`:",
        "",
        *table(Rename),
        "A node behind several others gets the union of their tensors; what is no mapping of tensors goes by the name of the",
        "node that gave it. `after: inputs` and `after: [inputs, other]` pass the request's tensors around nodes.",
        "",
        "## `batch`",
        "",
        *table(BatchPolicy),
        "## `sequences`",
        "",
        *table(SequencePolicy),
        "## `kafka`",
        "",
        *table(KafkaOptions),
        *inner_tables(KafkaOptions),
        "## Steps",
        "",
    ]
    for group, key in (("steps", "step"), ("routers", "router")):
        if group == "routers":
            lines += ["## Routers", ""]
        for kind in sorted(kinds(group)):
            options = load_kind(group, kind).options_type
            lines += [f"### `{key}: {kind}`", "", *table(options), *inner_tables(options)]
    lines += [
        "## `servinggraph serve`",
        "",
        "Each is an option: `max_in_flight` is `--max-in-flight`.",
        "",
        *table(ServerOptions),
    ]
    return "\n".join(lines)


def metrics(page: str) -> str:
    """Return the page of metrics with its table made anew."""
    rows = []
    for family in ALL:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        rows.append(f"| `{family.name}` | {family.kind} | {family.unit} | {labels} | {family.help} |")
    table = "\n".join(["| metric | kind | unit | labels | what it says |", "|---|---|---|---|---|", *rows])
    begin, rest = page.split(_TABLE)
    return f"{begin}{_TABLE}\n\n{table}\n\n{_END}{rest.split(_END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    METRICS.write_text(metrics(METRICS.read_text(encoding="utf-8")), encoding="utf-8")
