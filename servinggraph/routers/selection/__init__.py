"""How routers choose a branch: keys taken from requests, and weights with a stable hash."""

from servinggraph.routers.selection.keys import KeyReader, key_reader
from servinggraph.routers.selection.weights import Weights, weights_problem

__all__ = ["KeyReader", "Weights", "key_reader", "weights_problem"]
