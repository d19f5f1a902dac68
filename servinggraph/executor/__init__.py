"""Runs requests through a compiled plan. Knows nothing of YAML, protocols or devices.

`wiring` makes one callable of each node, `stretches` joins nodes that follow one another,
`executor` owns a plan's life and runs requests.
"""

from servinggraph.executor.executor import Executor

__all__ = ["Executor"]
