"""Models with state: fed from and kept for the sequence, alone and in batches."""

import asyncio

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from servinggraph import Graph, InvalidRequest, steps
from servinggraph.errors import GraphInvalid

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
X = {"x": ("FP32", [-1, 2])}
SUM = [helper.make_node("Add", ["x", "h"], ["y"]), helper.make_node("Identity", ["y"], ["h_out"])]


def save(path, inputs, outputs, nodes):
    info = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [info(*tensor) for tensor in inputs], [info(*tensor) for tensor in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


def running_total(path, rows="N", state=None, kind=FLOAT):
    """A model that gives the sum of all rows that a sequence has sent."""
    state = state or [rows, 2]
    return save(path, [("x", kind, [rows, 2]), ("h", kind, state)], [("y", kind, [rows, 2]), ("h_out", kind, state)], SUM)


@pytest.fixture
def total(tmp_path):
    return running_total(tmp_path / "total.onnx")


@pytest.fixture
def lstm(tmp_path):
    """An LSTM as exports have it: state [layers, batch, size], so its batch is axis 1."""
    random = np.random.default_rng(1)
    weights = [
        onnx.numpy_helper.from_array(random.normal(size=shape).astype("f4"), name)
        for name, shape in (("W", (1, 12, 2)), ("R", (1, 12, 3)))
    ]
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Unsqueeze", ["x", "zero"], ["steps"]),
        helper.make_node("LSTM", ["steps", "W", "R", "", "", "h", "c"], ["", "h_out", "c_out"], hidden_size=3),
        helper.make_node("Squeeze", ["h_out", "zero"], ["y"]),
    ]
    zero = onnx.numpy_helper.from_array(np.array([0], np.int64), "zero")
    state = [1, "N", 3]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", FLOAT, ["N", 2]), info("h", FLOAT, state), info("c", FLOAT, state)],
        [info("y", FLOAT, ["N", 3]), info("h_out", FLOAT, state), info("c_out", FLOAT, state)],
        [*weights, zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, tmp_path / "lstm.onnx")
    return tmp_path / "lstm.onnx"


H = {"input": "h", "output": "h_out"}


def graph_of(path, state=None, sequences=True, inputs=X, **options):
    graph = Graph("g", inputs=inputs, **({"sequences": {"idle_ms": 600_000}} if sequences else {}))
    graph.to(steps.Onnx(path, state=[H] if state is None else state, **options), name="m").respond()
    return graph


async def send(server, key, x, **flags):
    parameters = {"sequence_id": key, **{f"sequence_{name}": flag for name, flag in flags.items()}}
    reply = await server.infer(x=np.array(x, "f4"), parameters=parameters)
    return reply.outputs["y"].tolist()


def test_state_is_neither_an_input_nor_an_output(total):
    plan = graph_of(total).compile()
    assert ["y"] == list(plan.outputs)
    assert ["x"] == list(plan.nodes[0].signature.inputs)


@pytest.mark.parametrize("run", ["inline", "thread"])
@pytest.mark.parametrize("batch", [False, True, {"max_rows": 4, "pad_to": [4]}])
def test_it_is_kept_from_request_to_request(total, run, batch):
    async def check():
        async with graph_of(total, run=run, batch=batch).mock() as server:
            assert [[1, 2]] == await send(server, 1, [[1, 2]], start=True)
            assert [[7, 7]] == await send(server, "other", [[7, 7]], start=True)
            assert [[4, 6]] == await send(server, 1, [[3, 4]])
            assert [[5, 7]] == await send(server, 1, [[1, 1]], end=True)
            assert [[9, 9]] == await send(server, 1, [[9, 9]], start=True)

    asyncio.run(check())


def test_an_lstm_in_batches_gives_what_it_gives_alone(lstm):
    state = [{"input": name, "output": f"{name}_out", "axis": 1} for name in "hc"]
    data = np.random.default_rng(0).normal(size=(10, 20, 2)).astype("f4")

    async def everything(batch):
        sizes = []

        async with graph_of(lstm, state, run="thread", batch=batch).mock() as server:
            batcher = server._graph.executor.batchers.get("m")
            if batcher is not None:
                call = batcher._call
                batcher._call = lambda value, context: (sizes.append(len(context.sequences)), call(value, context))[1]

            async def sequence(key):
                return [await send(server, key + 1, [row], start=n == 0) for n, row in enumerate(data[key])]

            return await asyncio.gather(*(sequence(key) for key in range(10))), sizes

    alone, _ = asyncio.run(everything(False))
    together, sizes = asyncio.run(everything(None))
    assert np.allclose(alone, together, atol=1e-6)
    assert (True, 200) == (max(sizes) > 1, sum(sizes))  # none ran a second time, alone
    assert len({tuple(answers[-1][0]) for answers in alone}) == 10


def test_the_lstm_is_what_onnx_says_it_is(lstm):
    import onnxruntime

    session = onnxruntime.InferenceSession(lstm)
    data = np.random.default_rng(0).normal(size=(5, 1, 2)).astype("f4")
    h = c = np.zeros((1, 1, 3), "f4")
    expected = []
    for x in data:
        y, h, c = session.run(["y", "h_out", "c_out"], {"x": x, "h": h, "c": c})
        expected.append(y.tolist())

    async def check():
        state = [{"input": name, "output": f"{name}_out", "axis": 1} for name in "hc"]
        async with graph_of(lstm, state).mock() as server:
            assert expected == [await send(server, 1, x, start=n == 0) for n, x in enumerate(data)]

    asyncio.run(check())


def test_an_lstm_without_kept_state_is_not_tried_without_rows(tmp_path):
    """ONNX Runtime crashes the whole process on it."""
    weights = [
        onnx.numpy_helper.from_array(np.ones(shape, "f4"), name) for name, shape in (("W", (1, 12, 2)), ("R", (1, 12, 3)))
    ]
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Unsqueeze", ["x", "zero"], ["steps"]),
        helper.make_node("LSTM", ["steps", "W", "R"], ["", "h"], hidden_size=3),
        helper.make_node("Squeeze", ["h", "zero"], ["y"]),
    ]
    zero = onnx.numpy_helper.from_array(np.array([0], np.int64), "zero")
    graph = helper.make_graph(nodes, "g", [info("x", FLOAT, ["N", 2])], [info("y", FLOAT, ["N", 3])], [*weights, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, tmp_path / "plain.onnx")
    graph = Graph("g", inputs=X)
    graph.to(steps.Onnx(tmp_path / "plain.onnx"), name="m").respond()
    with graph.mock() as server:
        assert (2, 3) == server.infer(x=np.ones((2, 2), "f4")).outputs["y"].shape
        with pytest.raises(InvalidRequest, match="has no rows"):
            server.infer(x=np.ones((0, 2), "f4"))


def test_a_request_has_one_row(total):
    async def check():
        for batch in (False, True):
            async with graph_of(total, batch=batch).mock() as server:
                with pytest.raises(InvalidRequest, match="must specify batch-size 1 due to requirements of sequence batcher"):
                    await send(server, 1, [[1, 2], [3, 4]], start=True)

    asyncio.run(check())


def test_state_without_a_free_axis_runs_unbatched(tmp_path):
    model = running_total(tmp_path / "fixed.onnx", rows=1)

    async def check():
        async with graph_of(model, inputs={"x": ("FP32", [1, 2])}).mock() as server:
            assert [[1, 2]] == await send(server, 1, [[1, 2]], start=True)
            assert [[2, 4]] == await send(server, 1, [[1, 2]])

    asyncio.run(check())


def test_a_state_that_grows_begins_with_the_shape_that_is_given(tmp_path):
    model = save(
        tmp_path / "growing.onnx",
        [("x", FLOAT, ["N", 2]), ("past", FLOAT, ["M", "T"])],
        [("y", FLOAT, ["N", 2]), ("present", FLOAT, ["M", "T2"])],
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Concat", ["past", "x"], ["present"], axis=1)],
    )
    state = {"input": "past", "output": "present", "shape": [1, 0]}

    async def check():
        async with graph_of(model, [state]).mock() as server:
            for n in range(3):
                await send(server, 1, [[n, n]], start=n == 0)
            sequence = server._graph.sequences._table._sequences[1]
            assert [[0, 0, 1, 1, 2, 2]] == sequence.states["m"]["past"].tolist()

    asyncio.run(check())
    with pytest.raises(GraphInvalid, match="input 'past' has shape .-1, -1.: say the 'shape' of its zeros"):
        graph_of(model, [{"input": "past", "output": "present"}]).compile()
    with pytest.raises(
        GraphInvalid, match="cannot batch: state 'past' has shape .-1, -1., so that sequences may have states of"
    ):
        graph_of(model, [state], batch=True).compile()


def test_a_sequence_may_begin_with_a_file(total, tmp_path):
    np.save(tmp_path / "h.npy", np.array([[10, 20]], "f4"))

    async def check():
        async with graph_of(total, [{**H, "initial": str(tmp_path / "h.npy")}]).mock() as server:
            assert [[11, 22]] == await send(server, 1, [[1, 2]], start=True)

    asyncio.run(check())


def test_state_of_one_sequence_does_not_hold_the_batch_in_memory(total):
    async def check():
        async with graph_of(total, batch={"pad_to": [32], "max_rows": 32}).mock() as server:
            await send(server, 1, [[1, 2]], start=True)
            kept = server._graph.sequences._table._sequences[1].states["m"]["h"]
            assert ((1, 2), None) == (kept.shape, kept.base)

    asyncio.run(check())


@pytest.mark.parametrize(
    "state, reason",
    [
        ([{**H, "input": "hh"}], "'state': the model has no input 'hh'; did you mean 'h'?"),
        ([{**H, "output": "nope"}], "'state': the model has no output 'nope'; expected one of: h_out, y"),
        ([H, H], "'state': input 'h' is named twice"),
        ([{**H, "axis": 2}], "axis 2 is beyond input 'h' of shape"),
        ([{**H, "initial": "ones"}], "'initial' is neither 'zeros' nor a .npy file that can be read"),
        ([{**H, "shape": [1, 3]}], "input 'h' is FP32 [-1, 2], and cannot begin with FP32 [1, 3]"),
        ([{**H, "shape": [2, 2]}], "is for one sequence: axis 0 must be 1"),
        ([{"input": "h"}], "missing key 'state.0.output'"),
        ([{**H, "inital": "zeros"}], "unknown key 'state.0.inital'; did you mean 'initial'?"),
    ],
)
def test_state_that_does_not_fit_the_model_is_refused(total, state, reason):
    with pytest.raises(GraphInvalid) as refused:
        graph_of(total, state).compile()
    assert reason in str(refused.value)
    assert "node 'm'" in str(refused.value)


def test_state_of_another_datatype_or_text_is_refused(tmp_path):
    model = save(
        tmp_path / "cast.onnx",
        [("x", FLOAT, ["N", 2]), ("h", INT64, ["N", 2])],
        [("y", FLOAT, ["N", 2]), ("h_out", FLOAT, ["N", 2])],
        [
            helper.make_node("Cast", ["h"], ["f"], to=FLOAT),
            helper.make_node("Add", ["x", "f"], ["y"]),
            helper.make_node("Identity", ["y"], ["h_out"]),
        ],
    )
    with pytest.raises(
        GraphInvalid, match="output 'h_out' cannot go into input 'h': its datatype is INT64, the output's is FP32"
    ):
        graph_of(model).compile()
    text = save(
        tmp_path / "text.onnx",
        [("x", STRING, ["N", 2]), ("h", STRING, ["N", 2])],
        [("y", STRING, ["N", 2]), ("h_out", STRING, ["N", 2])],
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["h"], ["h_out"])],
    )
    with pytest.raises(GraphInvalid, match="input 'h' is text, which cannot be state"):
        graph_of(text, inputs={"x": ("BYTES", [-1, 2])}).compile()


def test_state_needs_a_graph_with_sequences(total):
    with pytest.raises(GraphInvalid, match="'state' is kept for sequences: the graph needs 'sequences: {}'"):
        graph_of(total, sequences=False).compile()


def test_a_fixed_batch_axis_of_the_state_cannot_be_batched(tmp_path):
    model = running_total(tmp_path / "m.onnx", state=[1, 2])
    with pytest.raises(GraphInvalid, match="cannot batch: the batch axis 0 of state 'h' is fixed, its shape is .1, 2."):
        graph_of(model, batch=True).compile()


def test_a_bare_model_may_have_state(total, tmp_path):
    from servinggraph.server import read_graphs

    overrides = ["sequences={}", "nodes.model.state=[{input: h, output: h_out}]"]
    (plan,) = read_graphs(total, overrides)
    assert (["x"], ["y"]) == (list(plan.inputs), list(plan.outputs))
