"""Embeds sample.txt sentence by sentence, and says which sentences are alike. Run it from anywhere.

.venv/bin/python examples/text/graph.py

With the model that convert.py makes it runs minilm.yaml; without it graph.yaml, whose embedder knows no language.
"""

from pathlib import Path

import numpy as np

from servinggraph import Graph

HERE = Path(__file__).parent


def best_graph() -> Path:
    """Return the graph file with the model if that was made, else the one that needs none."""
    return HERE / ("minilm.yaml" if (HERE / "model" / "minilm.onnx").is_file() else "graph.yaml")


if __name__ == "__main__":
    file = best_graph()
    if file.name == "minilm.yaml":
        print("embedder: all-MiniLM-L6-v2")
    else:
        print("embedder: hashed words and letters, since model/minilm.onnx is not there (convert.py makes it)")
    with Graph.load(file).mock() as server:  # no ports, yet the way that a request takes in production
        items = list(server.invoke_stream((HERE / "sample.txt").read_text(encoding="utf-8")))
    vectors = np.array([item["embedding"] for item in items])
    for item, row in zip(items, vectors @ vectors.T, strict=True):
        print("  ".join(f"{value:5.2f}" for value in row), "", item["sentence"])
