"""Writes the models and the request bodies: iris (a logistic regression) and mlp (784-1024-1024-10, FP32).

Run by setup.sh in an environment of its own. usage: make_models.py FOLDER
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from skl2onnx import to_onnx
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

OPSET = 17


def iris() -> onnx.ModelProto:
    features, labels = load_iris(return_X_y=True)
    features = features.astype(np.float32)
    regression = LogisticRegression(max_iter=500).fit(features, labels)
    return to_onnx(regression, features[:1], options={"zipmap": False}, target_opset=OPSET)


def mlp(*sizes: int) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer, (rows, columns) in enumerate(pairwise(sizes)):
        weight = (random.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"weight{layer}"))
        weights.append(numpy_helper.from_array(np.zeros(columns, np.float32), f"bias{layer}"))
        output = "y" if layer == len(sizes) - 2 else f"sum{layer}"
        nodes.append(helper.make_node("Gemm", [last, f"weight{layer}", f"bias{layer}"], [output]))
        if output != "y":
            nodes.append(helper.make_node("Relu", [output], [f"relu{layer}"]))
            last = f"relu{layer}"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", sizes[0]])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", sizes[-1]])]
    graph = helper.make_graph(nodes, "mlp", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    return model


def body(name: str, data: list[float]) -> str:
    """Return a V2 request of one row."""
    return json.dumps({"inputs": [{"name": name, "shape": [1, len(data)], "datatype": "FP32", "data": data}]})


def main(folder: Path) -> None:
    models = folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    (models / "iris.onnx").write_bytes(iris().SerializeToString())
    (models / "mlp.onnx").write_bytes(mlp(784, 1024, 1024, 10).SerializeToString())
    (folder / "iris.json").write_text(body("X", [5.1, 3.5, 1.4, 0.2]))
    pixels = np.random.default_rng(0).random(784).round(4)
    (folder / "mlp.json").write_text(body("x", pixels.tolist()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
