"""The JSON Schema of graph files agrees with the compiler."""

import jsonschema
import pytest
import yaml

from servinggraph.compiler import json_schema

GOOD = """
graph: fraud
version: "3"
inputs:
  transaction: {datatype: FP32, shape: [-1, 29]}
nodes:
  clean: {step: python, call: fraud.steps:clean, keep: all}
  score:
    router: ensemble
    combine: weighted_mean
    weights: {gbm: 2, mlp: 1}
    quorum: 1
    branches:
      gbm: {step: onnx, path: models/gbm.onnx, batch: {max_rows: 64, max_delay_ms: 2}}
      mlp: {step: onnx, path: models/mlp.onnx, device: cuda, batch: true}
  decide: {step: python, call: fraud.steps:decide, timeout_ms: 50, after: [clean, score]}
answer: decide
"""


def errors(text):
    return list(jsonschema.Draft202012Validator(json_schema()).iter_errors(yaml.safe_load(text)))


def test_the_schema_is_a_valid_schema():
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_a_good_file_is_valid():
    assert [] == errors(GOOD)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_rows: 64", "max_row: 64"),
        ("device: cuda", "devise: cuda"),
        ("step: onnx", "step: onix"),
        ("quorum: 1", "quorum: 0"),
        ("datatype: FP32", "datatype: FP31"),
        ("graph: fraud", "grahp: fraud"),
        ("call: fraud.steps:decide", "path: x"),
    ],
)
def test_what_the_compiler_refuses_by_key_the_editor_underlines(old, new):
    assert [] != errors(GOOD.replace(old, new))
