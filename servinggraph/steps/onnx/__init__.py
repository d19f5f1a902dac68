"""The `onnx` step: a model run by ONNX Runtime on a CPU, GPU or other device.

`session` opens models and names providers, `tensors` converts what V2 and ONNX Runtime see
differently, `probe` warms up and measures, `binding` keeps GPU traffic off the pageable path.
"""

from servinggraph.steps.onnx.step import Onnx, OnnxOptions

__all__ = ["Onnx", "OnnxOptions"]
