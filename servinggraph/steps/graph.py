"""The `graph` step: a graph from another file as a node."""

from __future__ import annotations

from pydantic import Field

from servinggraph.errors import GraphInvalid, Problem, StepFailed
from servinggraph.interfaces import Operation, Options, Step
from servinggraph.tensors import Signature

__all__ = ["GraphOptions", "SubGraph"]


class GraphOptions(Options):
    """A graph from another file, compiled into this one."""

    path: str = Field(description="The other graph's file; a relative path starts from this file's folder.")


class SubGraph(Step[GraphOptions]):
    """Stands for the nodes of another graph.

    They run in this process as if they were written here, and are named `outer.inner`: in errors, statistics, `/admin`
    and `graph.mock(replace=...)`. The other graph's relative paths start from its own file; it takes its declared inputs
    and no others, and gives its declared outputs. Its `batch`, `cache` and `timeout_ms` are this node's, where it has none.
    """

    options_type = GraphOptions

    def prepare(self) -> Signature:
        file = self.base / self.options.path  # an absolute path stays one
        if not file.is_file():
            what = "is a folder" if file.is_dir() else "does not exist"
            raise GraphInvalid([Problem(f"graph file '{self.options.path}' {what} (looked at {file})", node="path")])
        self.graph_file = file
        return Signature()

    def operation(self) -> Operation:
        raise StepFailed("stands for a graph, whose nodes run in its place")  # the executor never asks

    def describe(self) -> str:
        return f"graph {self.options.path}"
