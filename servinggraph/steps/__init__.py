"""Kinds of steps, one file each. `steps.Onnx(...)` and the like describe a node for the Python builder."""

from servinggraph.steps.builders import V2, Callback, Graph, Jsonl, Onnx, Publish, Python, Queue, Rest

__all__ = ["V2", "Callback", "Graph", "Jsonl", "Onnx", "Publish", "Python", "Queue", "Rest"]
