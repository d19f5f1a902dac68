"""Steps that put what passes elsewhere, and pass it on: `jsonl`, a line of a file; `callback`, an HTTP request."""

from servinggraph.steps.sinks.callback import Callback, CallbackOptions
from servinggraph.steps.sinks.jsonl import Jsonl, JsonlOptions

__all__ = ["Callback", "CallbackOptions", "Jsonl", "JsonlOptions"]
