"""Prometheus metrics: what there is (`families`), values read at one moment (`readings`), and their text (`exposition`)."""

from servinggraph.metrics.families import ALL, Family
from servinggraph.metrics.readings import Readings

__all__ = ["ALL", "Family", "Readings"]
