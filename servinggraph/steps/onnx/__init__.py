"""The `onnx` step: a model run by ONNX Runtime on a CPU, GPU or other device.

`session` opens models and names providers, `tensors` converts what V2 and ONNX Runtime see
differently, `probe` warms up and measures, `binding` keeps GPU traffic off the pageable path.
"""

import os

# ONNX Runtime 1.32 reports its use to its makers, on Linux as well. A server does so only where it is told to
# (ORT_DISABLE_TELEMETRY=0); the variable is read when the library is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from servinggraph.steps.onnx.step import Onnx, OnnxOptions

__all__ = ["Onnx", "OnnxOptions"]
