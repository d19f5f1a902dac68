"""The onnx step: signatures, batching decided by trial, text and maps, where it runs."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from servinggraph import Graph, steps
from servinggraph.accelerators import Placement, cuda_device_count, placement
from servinggraph.errors import DatatypeMismatch, GraphInvalid, InvalidRequest, ShapeMismatch, StepFailed
from servinggraph.steps.onnx.binding import BoundSession

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING


def save(path, inputs, outputs, nodes, constants=()):
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info(*tensor) for tensor in inputs], [info(*tensor) for tensor in outputs], list(constants)
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


@pytest.fixture
def double(tmp_path):
    return save(
        tmp_path / "double.onnx",
        [("x", FLOAT, ["N", 3])],
        [("y", FLOAT, ["N", 3])],
        [helper.make_node("Add", ["x", "x"], ["y"])],
    )


@pytest.fixture
def cumulative(tmp_path):
    """A model whose first axis is a sequence: each row depends on the rows before it."""
    return save(
        tmp_path / "cumulative.onnx",
        [("x", FLOAT, ["T", 3])],
        [("y", FLOAT, ["T", 3])],
        [helper.make_node("CumSum", ["x", "axis"], ["y"])],
        [numpy_helper.from_array(np.int64(0), "axis")],
    )


def graph_of(path, inputs, **options):
    graph = Graph("g", inputs=inputs)
    graph.to(steps.Onnx(path, **options), name="m").respond()
    return graph


X = {"x": ("FP32", [-1, 3])}
ROWS = np.arange(6, dtype="f4").reshape(2, 3)


def test_the_signature_is_read_from_the_model(double):
    plan = graph_of(double, X).compile()
    assert {"y": ("FP32", (-1, 3))} == {name: (spec.datatype, spec.shape) for name, spec in plan.outputs.items()}


@pytest.mark.parametrize("run", ["inline", "thread", "auto"])
def test_it_answers_wherever_it_runs(double, run):
    with graph_of(double, X, run=run).mock() as server:
        assert (ROWS * 2).tolist() == server.infer(x=ROWS).outputs["y"].tolist()
        large = np.random.default_rng(0).random((100, 3)).astype("f4")
        assert (large * 2).tolist() == server.infer(x=large).outputs["y"].tolist()


def test_a_model_whose_rows_influence_each_other_is_not_batched(cumulative, caplog):
    caplog.set_level("INFO", "servinggraph")
    with graph_of(cumulative, X).mock() as server:
        long = np.ones((50, 3), "f4")  # longer than a batch: pieces would begin anew
        assert 50.0 == server.infer(x=long).outputs["y"][-1, 0]
    assert "not batched: output 'y' of a row depends on the other rows" in caplog.text


def test_a_model_with_independent_rows_is_batched_without_being_told(double):
    plan = graph_of(double, X).compile()
    step = plan.nodes[0].work
    assert step.load(None).max_rows > 1
    assert step.load(False) is None
    step.unload()


def test_other_tensors_are_left_aside(double):
    with graph_of(double, {**X, "extra": ("FP32", [-1])}).mock() as server:
        assert {"y"} == set(server.infer(x=ROWS, extra=np.zeros(1, "f4")).outputs)


def test_a_bare_array_goes_to_the_only_input(double):
    graph = Graph("g", inputs=X)
    graph.to(lambda value: value["x"], name="f").to(steps.Onnx(double)).respond()
    with graph.mock() as server:
        assert 2.0 == server.infer(x=np.ones((1, 3), "f4")).outputs["y"][0, 0]


@pytest.mark.parametrize(
    ("result", "error", "text"),
    [
        ({"x": ROWS.astype("f8")}, DatatypeMismatch, "data-type is 'FP64', but model 'm' expects 'FP32'"),
        ({"x": ROWS[:, :2]}, ShapeMismatch, r"Expected \[-1,3\], got \[2,2\]"),
        ({"q": ROWS}, StepFailed, "model input 'x' did not arrive: got q"),
        ({"x": [1, 2, 3]}, StepFailed, "model input 'x' must be a numpy array, got list"),
        ("text", StepFailed, "takes tensors x by name, but got a str"),
    ],
)
def test_what_a_step_before_gives_is_checked(double, result, error, text):
    graph = Graph("g", inputs=X)
    graph.to(lambda value: result, name="f").to(steps.Onnx(double), name="m").respond()
    with graph.mock() as server, pytest.raises(error, match=text) as failed:
        server.infer(x=ROWS)
    assert "m" == failed.value.node


def test_text_goes_in_and_out(tmp_path):
    path = save(
        tmp_path / "text.onnx",
        [("t", STRING, ["N"])],
        [("u", STRING, ["N"])],
        [helper.make_node("Identity", ["t"], ["u"])],
    )
    with graph_of(path, {"t": ("BYTES", [-1])}, batch=False).mock() as server:
        assert ["ä1".encode(), b"b"] == server.infer(t=np.array(["ä1".encode(), b"b"], object)).outputs["u"].tolist()
        with pytest.raises(InvalidRequest, match="not UTF-8"):
            server.infer(t=np.array([b"\xff"], object))


def test_the_probability_map_of_a_scikit_learn_export_becomes_a_matrix(tmp_path):
    from skl2onnx import to_onnx
    from sklearn.linear_model import LogisticRegression

    data = np.random.default_rng(0).random((60, 3)).astype("f4")
    names = np.array(["cat", "ant", "bee"])[data.argmax(1)]
    classifier = LogisticRegression().fit(data, names)
    path = tmp_path / "map.onnx"
    path.write_bytes(to_onnx(classifier, data[:1], target_opset=17).SerializeToString())
    plan = graph_of(path, {"X": ("FP32", [-1, 3])}).compile()
    assert ("FP32", (-1, -1)) == (plan.outputs["output_probability"].datatype, plan.outputs["output_probability"].shape)
    with graph_of(path, {"X": ("FP32", [-1, 3])}).mock() as server:
        outputs = server.infer(X=data).outputs
    np.testing.assert_allclose(outputs["output_probability"], classifier.predict_proba(data), rtol=1e-4)
    assert [b.decode() for b in outputs["output_label"]] == classifier.predict(data).tolist()


def test_an_integer_model_with_a_fixed_shape_runs(tmp_path):
    path = save(
        tmp_path / "fixed.onnx",
        [("a", INT64, [2])],
        [("b", INT64, [2])],
        [helper.make_node("Neg", ["a"], ["b"])],
    )
    with graph_of(path, {"a": ("INT64", [2])}).mock() as server:
        assert [-1, -(2**62)] == server.infer(a=np.array([1, 2**62])).outputs["b"].tolist()


def test_warm_up_shapes_that_do_not_work_are_the_graphs_fault(tmp_path):
    path = save(
        tmp_path / "square.onnx",
        [("x", FLOAT, ["N", "H", "W"])],
        [("y", FLOAT, ["N", 2, 2])],
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        [numpy_helper.from_array(np.array([-1, 2, 2]), "s")],
    )
    inputs = {"x": ("FP32", [-1, -1, -1])}
    with graph_of(path, inputs, warmup_shapes={"x": [1, 2, 2]}).mock() as server:
        assert (3, 2, 2) == server.infer(x=np.zeros((3, 2, 2), "f4")).outputs["y"].shape
    bad = graph_of(path, inputs, warmup_shapes={"x": [1, 3, 3]})
    with pytest.raises(StepFailed, match="node 'm': warm-up with 'warmup_shapes' failed"), bad.mock():
        pass


def test_a_run_that_fails_is_an_error_with_the_node(tmp_path):
    path = save(
        tmp_path / "matrix.onnx",
        [("a", FLOAT, ["N", 2]), ("b", FLOAT, ["M", 2])],
        [("c", FLOAT, ["N", 2])],
        [helper.make_node("Add", ["a", "b"], ["c"])],
    )
    inputs = {"a": ("FP32", [-1, 2]), "b": ("FP32", [-1, 2])}
    with graph_of(path, inputs, batch=False).mock() as server, pytest.raises(StepFailed, match="node 'm': "):
        server.infer(a=np.zeros((2, 2), "f4"), b=np.zeros((3, 2), "f4"))


def test_auto_takes_the_cpu_where_there_is_no_gpu(double):
    if cuda_device_count():
        pytest.skip("this machine has a GPU")  # on one with a GPU `auto` takes it
    plan = graph_of(double, X, device="auto").compile()
    assert "on cpu" in plan.nodes[0].work.describe()


def test_device_names_are_read():
    assert Placement("cuda", 1) == placement("cuda:1")
    assert Placement("cpu") == placement("cpu")
    with pytest.raises(ValueError, match="'gpu' is no device"):
        placement("gpu")


def test_pad_to_runs_only_the_sizes_given(double, monkeypatch):
    graph = graph_of(double, X, batch={"max_rows": 8, "pad_to": [4, 8]}, run="inline")
    with graph.mock() as server:
        assert (ROWS * 2).tolist() == server.infer(x=ROWS).outputs["y"].tolist()
        assert (5, 3) == server.infer(x=np.zeros((5, 3), "f4")).outputs["y"].shape


def test_the_bound_session_gives_what_the_plain_one_gives(double):
    session = onnxruntime.InferenceSession(str(double), providers=["CPUExecutionProvider"])
    bound = BoundSession(session, ["y"], Placement("cpu"))
    (result,) = bound.run({"x": ROWS[:, ::-1]})
    assert (ROWS[:, ::-1] * 2).tolist() == result.tolist()


def test_session_settings_reach_onnx_runtime(double):
    options = {"threads": 2, "optimization": "basic", "session_config": {"session.dynamic_block_base": "4"}}
    with graph_of(double, X, **options).mock() as server:
        assert (2, 3) == server.infer(x=ROWS).outputs["y"].shape
    with pytest.raises(GraphInvalid, match="'optimization': expected 'disable', 'basic', 'extended' or 'all'"):
        graph_of(double, X, optimization="most").compile()


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_device_count(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_gpu_answers_as_the_cpu_does(double, device):
    with graph_of(double, X, device=device, batch={"max_rows": 64}).mock() as server:
        large = np.random.default_rng(0).random((64, 3)).astype("f4")
        np.testing.assert_allclose(server.infer(x=large).outputs["y"], large * 2, rtol=1e-3)


def test_a_model_that_fails_on_no_rows_refuses_them_as_the_requests_fault(tmp_path):
    path = save(
        tmp_path / "first.onnx",
        [("x", FLOAT, ["N", 3])],
        [("y", FLOAT, ["N", 3])],
        [helper.make_node("Gather", ["x", "zero"], ["first"], axis=0), helper.make_node("Add", ["x", "first"], ["y"])],
        [numpy_helper.from_array(np.array([0]), "zero")],
    )
    with graph_of(path, X, batch=True).mock() as server:
        assert (1, 3) == server.infer(x=ROWS[:1]).outputs["y"].shape
        with pytest.raises(InvalidRequest, match="node 'm': input 'x' has no rows"):
            server.infer(x=ROWS[:0])


def test_a_model_that_takes_no_rows_gives_none(double):
    with graph_of(double, X).mock() as server:
        assert (0, 3) == server.infer(x=ROWS[:0]).outputs["y"].shape


def test_an_unbatched_model_of_any_number_of_rows_never_runs_on_the_event_loop_by_itself(double):
    plan = graph_of(double, X, batch=False).compile()
    step = plan.nodes[0].work
    step.load(False)
    assert "(thread)" in step.describe()
    step.unload()


def test_a_folder_for_engines_that_cannot_be_made_is_not_said_to_be_a_broken_model(double, tmp_path, monkeypatch):
    monkeypatch.setattr("servinggraph.steps.onnx.step.placed", lambda wanted: wanted)
    (tmp_path / "taken").write_text("")
    folder = tmp_path / "taken" / "engines"
    with pytest.raises(GraphInvalid) as failure:
        graph_of(double, X, device="tensorrt", tensorrt={"cache_folder": str(folder)}).compile()
    assert f"the folder '{folder}' for TensorRT's engines cannot be made (at {folder}): Not a directory" in str(failure.value)
    assert "cannot read" not in str(failure.value)
