"""The ONNX session that every peer runs: the same file, one thread, the CPU."""

import os

import onnxruntime as ort


def open_session(model: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(f"{os.environ['MODELS']}/{model}.onnx", options, providers=["CPUExecutionProvider"])
