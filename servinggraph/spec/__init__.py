"""The definition of a graph: one model underneath YAML and the Python builder."""

from servinggraph.spec.model import GraphSpec, NodeSpec, Rename, TensorModel
from servinggraph.spec.source import Source, read_file, read_text

__all__ = ["GraphSpec", "NodeSpec", "Rename", "Source", "TensorModel", "read_file", "read_text"]
