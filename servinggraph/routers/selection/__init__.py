"""How routers choose a branch: keys taken from requests, weights with a stable hash, and what was decided for whom."""

from servinggraph.routers.selection.decisions import Decisions
from servinggraph.routers.selection.keys import KeyReader, key_reader, key_tensors
from servinggraph.routers.selection.rewards import Rewards
from servinggraph.routers.selection.weights import Weights, weights_problem

__all__ = ["Decisions", "KeyReader", "Rewards", "Weights", "key_reader", "key_tensors", "weights_problem"]
