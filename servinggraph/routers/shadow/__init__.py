"""What a champion's challengers run on: copies of requests beside the requests, comparisons, and records of them."""

from servinggraph.routers.shadow.comparison import Comparison, ComparisonOptions, TensorRule, Verdict
from servinggraph.routers.shadow.lane import Copy, Lane, ShadowOptions
from servinggraph.routers.shadow.record import Record

__all__ = ["Comparison", "ComparisonOptions", "Copy", "Lane", "Record", "ShadowOptions", "TensorRule", "Verdict"]
