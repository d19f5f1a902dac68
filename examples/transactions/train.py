"""Trains the two models of the transactions example, on made-up data, and writes everything that the example needs.

Run it from the repository root:

    .venv/bin/python -m pip install scikit-learn==1.9.1 skl2onnx==1.20.0 onnx==1.23.2
    .venv/bin/python examples/transactions/train.py

It takes some seconds and writes, beside this file or to the folder given as argument:

    models/trees.onnx   gradient boosted trees
    models/mlp.onnx     a small neural network
    sample.json         one transaction
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from skl2onnx import to_onnx  # noqa: E402
from skl2onnx.common.data_types import FloatTensorType  # noqa: E402
from sklearn.ensemble import GradientBoostingClassifier  # noqa: E402
from sklearn.metrics import average_precision_score  # noqa: E402
from sklearn.neural_network import MLPClassifier  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from transaction_steps import COLUMNS, features  # noqa: E402
from transactions import transactions  # noqa: E402

TRAINING, TEST = (1, 40_000), (2, 10_000)  # seed, transactions; the producer's seed is another one


def main(folder: Path) -> None:
    rows, labels = dataset(*TRAINING)
    test_rows, test_labels = dataset(*TEST)
    print(f"{labels.mean():.2%} of {len(labels)} are fraud")
    models = {
        "trees": GradientBoostingClassifier(n_estimators=40, max_depth=3, subsample=0.7, random_state=0),
        "mlp": make_pipeline(StandardScaler(), MLPClassifier((16,), alpha=0.01, early_stopping=True, random_state=0)),
    }
    (folder / "models").mkdir(parents=True, exist_ok=True)
    answers = []
    for name, model in models.items():
        model.fit(rows, labels)
        answers.append(model.predict_proba(test_rows)[:, 1])
        print(f"{name:<8} average precision {average_precision_score(test_labels, answers[-1]):.3f}")
        exported = to_onnx(
            model,
            initial_types=[("features", FloatTensorType([None, len(COLUMNS)]))],
            options={"zipmap": False},
            target_opset={"": 18, "ai.onnx.ml": 3},
        )
        (folder / "models" / f"{name}.onnx").write_bytes(exported.SerializeToString())
    mean = np.mean(answers, axis=0)
    print(f"{'mean':<8} average precision {average_precision_score(test_labels, mean):.3f} on {len(test_labels)} others")
    caught = (mean >= 0.2)[test_labels == 1].mean()
    print(f"{caught:.0%} of the fraud is reviewed or declined, {(mean >= 0.2)[test_labels == 0].mean():.2%} of the rest")
    sample, _ = next(transactions(3))
    (folder / "sample.json").write_text(json.dumps(sample, indent=2) + "\n", encoding="utf-8")


def dataset(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    documents, labels = zip(*itertools.islice(transactions(seed), count), strict=True)
    return np.concatenate([features(document)["features"] for document in documents]), np.array(labels)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
