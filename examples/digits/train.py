"""Trains the two models of the digits example and writes everything that the example needs.

Run it from the repository root:

    .venv/bin/python -m pip install scikit-learn==1.9.1 skl2onnx==1.20.0 onnx==1.23.2
    .venv/bin/python examples/digits/train.py

It takes a few seconds and writes, beside this file or to the folder given as argument:

    models/tree.onnx   gradient boosted trees
    models/mlp.onnx    a small neural network
    sample.json        a V2 request for one scan that the models were not trained on
    holdout.npz        all such scans, their labels, and what scikit-learn alone answers for them
"""

import sys
from pathlib import Path

import numpy as np
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_digits
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

SEED = 0


def main(folder: Path) -> None:
    digits = load_digits()  # 1797 scans of 8x8 pixels, ink from 0 to 16, shipped with scikit-learn
    images = digits.images.astype(np.uint8)
    seen, held_out, seen_labels, labels = train_test_split(
        images, digits.target, test_size=0.3, random_state=SEED, stratify=digits.target
    )
    models = {
        "tree": GradientBoostingClassifier(
            n_estimators=60, learning_rate=0.2, subsample=0.7, max_features=8, random_state=SEED
        ),
        "mlp": MLPClassifier((64,), alpha=0.01, max_iter=500, random_state=SEED),
    }
    (folder / "models").mkdir(parents=True, exist_ok=True)
    answers = []
    for name, model in models.items():
        model.fit(pixels(seen), seen_labels)
        answers.append(model.predict_proba(pixels(held_out)))
        print(f"{name:<8} accuracy {accuracy(answers[-1], labels):.4f}")
        save(model, folder / "models" / f"{name}.onnx")
    probabilities = np.mean(answers, axis=0)
    print(f"{'average':<8} accuracy {accuracy(probabilities, labels):.4f} on {len(labels)} scans that were held out")
    np.savez_compressed(folder / "holdout.npz", images=held_out, labels=labels, probabilities=probabilities)
    (folder / "sample.json").write_text(request(held_out[0]), encoding="utf-8")
    print(f"sample.json shows a {labels[0]}")


def pixels(images: np.ndarray) -> np.ndarray:
    """Return scans as the models take them; the step `prepare` does the same."""
    return images.reshape(-1, 64).astype(np.float32) / 16


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def save(model: GradientBoostingClassifier | MLPClassifier, path: Path) -> None:
    # The free first axis lets the server batch. Without zipmap the probabilities are one tensor, not
    # a list of dictionaries. Opset 18 is old enough for every onnxruntime that servinggraph takes.
    exported = to_onnx(
        model,
        initial_types=[("pixels", FloatTensorType([None, 64]))],
        options={"zipmap": False},
        target_opset={"": 18, "ai.onnx.ml": 3},
    )
    path.write_bytes(exported.SerializeToString())


def request(image: np.ndarray) -> str:
    """Return a V2 request with a line for each row of pixels, so that a reader sees the digit."""
    rows = ",\n".join("      [" + ", ".join(f"{pixel:2d}" for pixel in row) + "]" for row in image.tolist())
    head = '{"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 8, 8], "data": [\n    [\n'
    return head + rows + "\n    ]\n]}]}\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
