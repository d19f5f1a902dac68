"""Turns a graph definition into a plan, or says everything that is wrong with it.

`options` validates, `topology` orders, `nodes` makes steps and routers, `signatures` checks
that tensors meet. Nothing is loaded or run; `servinggraph check` is this and no more.
"""

from servinggraph.compiler.compile import compile_graph, compile_source
from servinggraph.compiler.schema import json_schema

__all__ = ["compile_graph", "compile_source", "json_schema"]
