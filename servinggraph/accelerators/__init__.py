"""Which devices this machine has, and what a `device:` in a graph means; GPU memory of other processes."""

from servinggraph.accelerators.cuda import CudaDriver, CudaMemory, cuda_driver
from servinggraph.accelerators.devices import Placement, cuda_device_count, placement

__all__ = ["CudaDriver", "CudaMemory", "Placement", "cuda_device_count", "cuda_driver", "placement"]
