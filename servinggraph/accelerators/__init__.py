"""Which devices this machine has, and what a `device:` in a graph means."""

from servinggraph.accelerators.devices import Placement, cuda_device_count, placement

__all__ = ["Placement", "cuda_device_count", "placement"]
