"""The graph of graph.yaml, built in Python. Run it from anywhere: it reads the digit in sample.json.

.venv/bin/python examples/digits/graph.py
"""

import json
import os
from pathlib import Path

from digits_steps import decide, prepare

from servinggraph import Graph, routers, steps

HERE = Path(__file__).parent


def build() -> Graph:
    # Relative paths, so that `save` can write a file that moves together with the models.
    models = os.path.relpath(HERE / "models")
    batch = {"max_rows": 64}
    graph = Graph(
        "digits",
        inputs={"image": ("UINT8", [-1, 8, 8])},
        description="Reads handwritten digits from scans of 8x8 pixels.",
    )
    score = routers.Ensemble(
        {
            "tree": steps.Onnx(f"{models}/tree.onnx", batch=batch),
            "mlp": steps.Onnx(f"{models}/mlp.onnx", batch=batch),
        },
        combine="mean",
        tensors=["probabilities"],
    )
    return graph.to(prepare).to(score, "score").to(decide, keep=["probabilities"]).respond()


if __name__ == "__main__":
    image = json.loads((HERE / "sample.json").read_text(encoding="utf-8"))["inputs"][0]["data"]
    with build().mock() as server:  # no ports, yet the way that a request takes in production
        answer = server.infer(image=image).outputs
    print(f"digit {answer['label'][0]}, probability {answer['confidence'][0]:.3f}")
