"""The rules of V2 inference, whatever wire a request came over. Runs through every front end."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from ml_dtypes import bfloat16

from servinggraph import Context, Graph, InvalidRequest, routers, signature, steps
from servinggraph.errors import (
    DatatypeMismatch,
    DeadlineExceeded,
    GraphNotFound,
    LimitExceeded,
    RequestTooLarge,
    StepFailed,
)

pytestmark = pytest.mark.anyio

X = np.array([1.0, 2.0], np.float32)
ARRAYS = {
    "BOOL": np.array([[True, False, True]]),
    "UINT8": np.array([[0, 1, 255]], np.uint8),
    "UINT16": np.array([[0, 1, 65535]], np.uint16),
    "UINT32": np.array([[0, 1, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**53 + 1, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 0, 127]], np.int8),
    "INT16": np.array([[-(2**15), 0, 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 0, 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 2**53 + 1, 2**63 - 1]], np.int64),
    "FP16": np.array([[0.1, -65504, 6e-8]], np.float16),
    "FP32": np.array([[0.1, -3.4e38, 1e-45]], np.float32),
    "FP64": np.array([[0.1, -1.7976931348623157e308, 5e-324]], np.float64),
    "BF16": np.array([[0.1, -3.3e38, 1e-38]], bfloat16),
    "BYTES": np.array([[b"", b"null", "text é ☃ 😀\0".encode()]], np.object_),
}


def echo(value):
    return {"y": value["x"]}


def a_graph(work=echo, datatype="FP32", shape=(-1,), name="step", **options):
    graph = Graph("g", {"x": (datatype, list(shape))}, version=3, **options)
    graph.to(work, name).respond()
    return graph


def two_inputs(work=None, **optional):
    def add(a, b=None):
        return {"sum": a if b is None else a + b, "a": a}

    second = {"datatype": "FP32", "shape": [-1], "optional": optional.get("optional", False)}
    outputs = {"sum": ("FP32", [-1]), "a": ("FP32", [-1])}
    return (
        Graph("g", {"a": ("FP32", [-1]), "b": second}, outputs=outputs)
        .to(work or (lambda value: add(**value)), "step")
        .respond()
    )


async def test_an_answer_names_the_graph_and_its_concrete_version(front_end):
    async with front_end.open(a_graph()) as client:
        reply = await client.infer({"x": X})

    assert ("g", "3", [1.0, 2.0]) == (reply.model, reply.version, reply.outputs["y"].tolist())


async def test_a_version_may_be_asked_for_by_number(front_end):
    async with front_end.open(a_graph()) as client:
        reply = await client.infer({"x": X}, version="3")

    assert "3" == reply.version


async def test_an_unknown_model_is_not_found(front_end):
    async with front_end.open(a_graph()) as client:
        with pytest.raises(GraphNotFound, match="Request for unknown model: 'nope' is not found"):
            await client.infer({"x": X}, model="nope")


async def test_an_unknown_version_is_not_found(front_end):
    async with front_end.open(a_graph()) as client:
        with pytest.raises(GraphNotFound, match="Request for unknown model: 'g' version 4 is not found"):
            await client.infer({"x": X}, version="4")


async def test_another_datatype_than_declared_is_refused(front_end):
    async with front_end.open(a_graph()) as client:
        with pytest.raises(InvalidRequest, match="inference input 'x' data-type is 'FP64', but model 'g' expects 'FP32'"):
            await client.infer({"x": X.astype(np.float64)})
        with pytest.raises(InvalidRequest, match="data-type is 'INT32'"):
            await client.infer({"x": X.astype(np.int32)})


async def test_another_shape_than_declared_is_refused(front_end):
    async with front_end.open(a_graph(shape=(-1, 16))) as client:
        text = r"unexpected shape for input 'x' for model 'g'. Expected \[-1,16\], got \[1,15\]"
        with pytest.raises(InvalidRequest, match=text):
            await client.infer({"x": np.zeros((1, 15), np.float32)})
        with pytest.raises(InvalidRequest, match="unexpected shape"):
            await client.infer({"x": np.zeros(16, np.float32)})


async def test_a_missing_input_is_refused_by_name(front_end):
    text = r"expected 2 inputs but got 1 inputs for model 'g'. Got input\(s\) \['b'\], but missing required input\(s\) \['a'\]"
    async with front_end.open(two_inputs()) as client:
        with pytest.raises(InvalidRequest, match=text):
            await client.infer({"b": X})
        with pytest.raises(InvalidRequest, match=r"missing required input\(s\) \['a','b'\]"):
            await client.infer({})


async def test_an_input_that_is_not_declared_is_refused_by_name(front_end):
    async with front_end.open(a_graph()) as client:
        with pytest.raises(InvalidRequest, match="unexpected inference input 'z' for model 'g'"):
            await client.infer({"x": X, "z": X})


async def test_an_input_that_comes_twice_is_refused(front_end):
    async with front_end.open(a_graph()) as client:
        with pytest.raises(InvalidRequest, match="input 'x' already exists in request"):
            await client.infer({"x": X}, twice="x")


async def test_an_optional_input_may_be_left_out_and_a_required_one_may_not(front_end):
    async with front_end.open(two_inputs(optional=True)) as client:
        assert [1, 2] == (await client.infer({"a": X})).outputs["sum"].tolist()
        assert [2, 4] == (await client.infer({"a": X, "b": X})).outputs["sum"].tolist()
        with pytest.raises(
            InvalidRequest, match=r"expected between 1 and 2 inputs but got 1 inputs.*required input\(s\) \['a'\]"
        ):
            await client.infer({"b": X})


async def test_a_request_without_inputs_runs_when_all_are_optional(front_end):
    graph = Graph("g", {"x": {"datatype": "FP32", "shape": [-1], "optional": True}})
    graph.to(lambda value: {"y": np.array([len(value)])}, "step").respond()
    async with front_end.open(graph) as client:
        assert [0] == (await client.infer({})).outputs["y"].tolist()


async def test_only_the_outputs_asked_for_come_in_that_order(front_end):
    async with front_end.open(two_inputs()) as client:
        both = {"a": X, "b": X}
        assert ["sum", "a"] == list((await client.infer(both)).outputs)
        assert ["a"] == list((await client.infer(both, outputs=["a"])).outputs)
        assert ["a", "sum"] == list((await client.infer(both, outputs=["a", "sum", "a"])).outputs)


async def test_an_output_that_does_not_exist_is_refused_by_name(front_end):
    async with front_end.open(two_inputs()) as client:
        with pytest.raises(InvalidRequest, match="unexpected inference output 'product' for model 'g'"):
            await client.infer({"a": X, "b": X}, outputs=["product"])
    async with front_end.open(a_graph()) as client:  # known only once it has run
        with pytest.raises(InvalidRequest, match="unexpected inference output 'product' for model 'g', it gave y"):
            await client.infer({"x": X}, outputs=["product"])


async def test_an_id_comes_back_as_it_was_and_only_if_there_was_one(front_end):
    async with front_end.open(a_graph()) as client:
        for given in ("r-1", "", "é ☃ 😀", 'quote " and \\ and \n', "null"):
            assert given == (await client.infer({"x": X}, id=given)).id


async def test_parameters_reach_the_steps_and_response_parameters_come_back(front_end):
    def tell(value, context: Context):
        given = dict(context.parameters)
        given.pop("binary_data_output", None)
        context.response_parameters.update(given)
        context.response_parameters["id"] = context.id
        context.response_parameters["graph"] = context.graph
        return {"y": value["x"]}

    parameters = {"text": "é", "number": 3, "big": 2**63 - 1, "flag": True, "real": 0.5, "content_type": "np"}
    async with front_end.open(a_graph(tell)) as client:
        reply = await client.infer({"x": X}, id="r", parameters=parameters)

    assert {**parameters, "id": "r", "graph": "g"} == dict(reply.parameters)
    assert reply.parameters["flag"] is True


async def test_reserved_parameter_names_are_refused(front_end):
    async with front_end.open(a_graph()) as client:
        with pytest.raises(InvalidRequest, match="parameter keys starting with 'triton_' are reserved"):
            await client.infer({"x": X}, parameters={"triton_x": 1})


async def test_a_parameter_that_is_no_scalar_is_refused(front_end):
    async with front_end.open(a_graph()) as client:
        for value in (None, [1], {"a": 1}):
            with pytest.raises(InvalidRequest, match="parameter 'p' has invalid type"):
                await client.infer({"x": X}, parameters={"p": value})


async def test_timeout_and_priority_are_whole_numbers_from_0_on(front_end):
    async with front_end.open(a_graph()) as client:
        for name in ("timeout", "priority"):
            for value in (-1, 1.5, "5", True, -(2**63)):
                with pytest.raises(InvalidRequest, match=f"parameter '{name}' is a whole number"):
                    await client.infer({"x": X}, parameters={name: value})
        assert [1, 2] == (await client.infer({"x": X}, parameters={"timeout": 2**63 - 1, "priority": 2**63 - 1})).outputs[
            "y"
        ].tolist()


async def test_response_parameters_may_be_numpy_scalars(front_end):
    def tell(value, context: Context):
        context.response_parameters.update(
            {"mean": np.float32(1.5), "rows": np.int64(2), "flag": np.bool_(True), "text": np.str_("a"), "nan": float("nan")}
        )
        return {"y": value["x"]}

    async with front_end.open(a_graph(tell)) as client:
        parameters = (await client.infer({"x": X})).parameters

    assert (1.5, 2, True, "a") == tuple(parameters[name] for name in ("mean", "rows", "flag", "text"))
    assert parameters["nan"] != parameters["nan"]


async def test_a_response_parameter_that_no_wire_carries_is_the_step_s_failure(front_end):
    def tell(tensors, context: Context):
        context.response_parameters["p"] = value
        return {"y": tensors["x"]}

    async with front_end.open(a_graph(tell)) as client:
        for value in (None, [1], {"a": 1}, b"raw", object(), np.zeros(2), 2**64, 1j, "\ud800"):  # noqa: B007  (`tell` reads it)
            with pytest.raises(StepFailed, match="node 'step': .*response parameter 'p'"):
                await client.infer({"x": X})
            assert 0 == client.in_flight


def all_datatypes(shape):
    inputs = {name: {"datatype": name, "shape": list(shape), "optional": True} for name in ARRAYS}
    return Graph("g", inputs).to(lambda value: {**value}, "step").respond()


async def test_every_datatype_comes_back_as_it_went(front_end, same):
    async with front_end.open(all_datatypes((-1, -1))) as client:
        for datatype, array in ARRAYS.items():
            empty = np.zeros((0, 3), array.dtype)
            large = np.repeat(array, 1000, axis=0)
            for sent in (array, empty, large):
                assert same(sent, (await client.infer({datatype: sent})).outputs[datatype]), datatype
        together = (await client.infer(ARRAYS)).outputs
        assert all(same(array, together[datatype]) for datatype, array in ARRAYS.items())


async def test_scalars_have_the_shape_of_scalars(front_end, same):
    async with front_end.open(all_datatypes(())) as client:
        for datatype, array in ARRAYS.items():
            scalar = np.empty((), array.dtype)
            scalar[()] = array[0, -1]
            assert same(scalar, (await client.infer({datatype: scalar})).outputs[datatype]), datatype


async def test_not_a_number_and_infinities_come_back(front_end, same):
    async with front_end.open(all_datatypes((-1,))) as client:
        for datatype in ("FP16", "BF16", "FP32", "FP64"):
            array = np.array([np.nan, np.inf, -np.inf, -0.0, 1.5]).astype(ARRAYS[datatype].dtype)
            reply = (await client.infer({datatype: array})).outputs[datatype]
            assert same(array, reply), datatype
            assert np.signbit(reply[3]), datatype


NOT_CONTIGUOUS = {
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "reversed": np.arange(12, dtype=np.int64)[::-2].reshape(3, 2),
    "broadcast": np.broadcast_to(np.array([True, False]), (3, 2)),
    "column-major": np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(3, 2)),
    "strided": np.arange(12, dtype=np.float64)[::3],
    "bfloat16": np.arange(12, dtype=np.float32).astype(bfloat16).reshape(3, 4).T,
    "text": np.array([[b"a", b"b", b"c"], [b"d", b"e", b"f"]], np.object_).T,
}


async def test_outputs_that_are_not_contiguous_come_in_their_own_order(front_end, same):
    async with front_end.open(a_graph(lambda value: NOT_CONTIGUOUS)) as client:
        outputs = (await client.infer({"x": X})).outputs

    assert [] == [name for name, array in NOT_CONTIGUOUS.items() if not same(array, outputs[name])]


async def test_bytes_outputs_may_be_text_or_bytes_of_any_kind(front_end):
    kinds = {
        "str": np.array(["a", "é ☃"], np.object_),
        "bytes": np.array([b"a", "é ☃".encode()], np.object_),
        "fixed-width text": np.array(["a", "é ☃"]),
        "fixed-width bytes": np.array([b"a", "é ☃".encode()]),
        **({"numpy text": np.array(["a", "é ☃"], np.dtypes.StringDType())} if hasattr(np.dtypes, "StringDType") else {}),
    }
    async with front_end.open(a_graph(lambda value: kinds)) as client:
        outputs = (await client.infer({"x": X})).outputs

    for name in kinds:
        elements = [item.encode() if isinstance(item, str) else item for item in outputs[name].tolist()]
        assert [b"a", "é ☃".encode()] == elements, name


BAD_ANSWERS = [
    ({"y": np.array([1, 2], ">f4")}, "output 'y' has dtype >f4, which no V2 datatype stands for"),
    ({"y": np.array([1j])}, "output 'y' has dtype complex128"),
    ({"y": np.array(["2020-01-01"], "datetime64[D]")}, "output 'y' has dtype datetime64"),
    ({"y": np.array([b"a", 5], np.object_)}, "output 'y' is BYTES, but an element is a int"),
    ({"y": np.array([None], np.object_)}, "output 'y' is BYTES, but an element is a NoneType"),
    ({"y": np.array(["\ud800"], np.object_)}, "half of a surrogate pair"),
    ({"y": [1, 2]}, "answer tensor 'y' is a list, expected a numpy array"),
    ({"y": None}, "gave no tensor 'y'"),
    ({5: X}, "named 5"),
    (X, "expected a mapping of tensor name to numpy array"),
    (None, "gave a NoneType as the answer"),
    ({"\ud800": X}, "(TypeError|output .* half of a surrogate pair in its name)"),
]


async def test_an_answer_that_cannot_be_sent_is_the_step_s_failure(front_end):
    async with front_end.open(a_graph(lambda value: answer)) as client:
        for answer, text in BAD_ANSWERS:  # noqa: B007  (the step reads it)
            with pytest.raises(StepFailed, match=f"node 'step': .*{text}"):
                await client.infer({"x": X})
            assert 0 == client.in_flight


async def test_an_answer_without_tensors_is_one(front_end):
    async with front_end.open(a_graph(lambda value: {})) as client:
        assert {} == (await client.infer({"x": X})).outputs


async def test_a_numpy_scalar_is_an_output(front_end):
    async with front_end.open(a_graph(lambda value: {"y": value["x"].sum()})) as client:
        assert 3.0 == (await client.infer({"x": X})).outputs["y"][()]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (np.ones(2, np.float64), "answer tensor 'y' has datatype FP64, declared is FP32"),
        (np.ones((2, 1), np.float32), r"answer tensor 'y' has shape \[2, 1\], declared is \[-1\]"),
    ],
)
async def test_an_answer_that_is_not_what_the_metadata_promise_is_a_failure(front_end, answer, text):
    @signature(outputs={"y": ("FP32", [-1])})
    def other(value):
        return {"y": answer}

    async with front_end.open(a_graph(other)) as client:
        with pytest.raises(StepFailed, match=text):
            await client.infer({"x": X})


class Awkward(Exception):
    def __str__(self):
        raise RuntimeError("no text for you")


class Panic(BaseException):
    """What libraries written in Rust raise (pyo3's PanicException is no Exception either)."""


ERRORS = [
    ValueError("bad value"), SystemExit(3), asyncio.CancelledError(), StopIteration(5), StopAsyncIteration(), TimeoutError(),
    MemoryError(), Awkward(), RuntimeError("\ud800 {} %s"), RecursionError(), asyncio.InvalidStateError(), Panic("at the disco"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "async", "thread", "batched", "batched async", "batched thread"])
async def test_whatever_a_step_raises_is_answered_names_the_step_and_frees_the_slot(front_end, kind):
    def plain(value):
        if value["x"][0] == 1:
            raise error
        return {"y": value["x"]}

    async def waiting(value):
        await asyncio.sleep(0)
        return plain(value)

    work = steps.Python(plain, run="thread") if "thread" in kind else waiting if "async" in kind else plain
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(work, "broken", **({"batch": True} if "batched" in kind else {})).respond()
    async with front_end.open(graph) as client:
        for error in ERRORS:
            async with asyncio.timeout(60):
                with pytest.raises(StepFailed, match="node 'broken'"):
                    await client.infer({"x": X})
                assert 0 == client.in_flight, error.__class__
                assert [2.0] == (await client.infer({"x": X[1:]})).outputs["y"].tolist()


async def test_a_caller_s_mistake_that_a_step_finds_is_the_caller_s(front_end):
    def check(value):
        raise InvalidRequest("amounts are positive")

    async with front_end.open(a_graph(check)) as client:
        with pytest.raises(InvalidRequest, match="node 'step': amounts are positive"):
            await client.infer({"x": X})


async def test_a_deadline_ends_the_run_and_frees_the_slot(front_end):
    begun, ended = [], []

    async def wait(value):
        begun.append(True)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    for where in ("wire", "parameter", "graph"):
        begun.clear()
        ended.clear()
        for times in (1, 5, 25, 125):  # a request that takes longer to the step than it has time never gets there
            soon_s = 0.02 * times
            limits = {"timeout_ms": soon_s * 1e3} if where == "graph" else {}
            options = {"parameters": {"timeout": int(soon_s * 1e6)}} if where == "parameter" else {}
            if where == "wire":
                options = {"timeout_s": soon_s + times * getattr(front_end, "way_s", 0)}
            async with front_end.open(a_graph(wait, **limits)) as client:
                # A gRPC client has the deadline, too, and does not wait for the server to say so.
                with pytest.raises(DeadlineExceeded, match=r"Request timeout expired|^Deadline Exceeded$"):
                    await client.infer({"x": X}, **options)
                async with asyncio.timeout(60):
                    while client.in_flight:
                        await asyncio.sleep(0.001)
            if begun:
                break
        assert len(begun) == len(ended) > 0


async def test_a_server_that_is_full_refuses_at_once_and_names_the_limit(front_end):
    free = asyncio.Event()
    entered = asyncio.Event()

    async def wait(value):
        entered.set()
        await free.wait()
        return {"y": value["x"]}

    async with front_end.open(a_graph(wait), max_in_flight=1) as client:
        first = asyncio.ensure_future(client.infer({"x": X}))
        await entered.wait()
        with pytest.raises(LimitExceeded, match=r"limit 'max_in_flight' = 1"):
            await client.infer({"x": X})
        free.set()
        assert [1.0, 2.0] == (await first).outputs["y"].tolist()
        assert 0 == client.in_flight
        assert [1.0, 2.0] == (await client.infer({"x": X})).outputs["y"].tolist()


async def test_a_queue_that_is_full_refuses_at_once_and_names_the_limit(front_end):
    free = asyncio.Event()

    async def wait(value):
        await free.wait()
        return {"y": value["x"]}

    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(wait, "queued", batch={"max_rows": 2, "max_queue": 1}).respond()
    async with front_end.open(graph) as client:
        first = asyncio.ensure_future(client.infer({"x": X}))
        while client.in_flight < 1:
            await asyncio.sleep(0)
        second = asyncio.ensure_future(client.infer({"x": X}))
        third = asyncio.ensure_future(client.infer({"x": X}))
        done, _ = await asyncio.wait([second, third], return_when=asyncio.FIRST_COMPLETED, timeout=60)
        with pytest.raises(LimitExceeded, match="node 'queued': .*limit 'batch.max_queue'"):
            await done.pop()
        free.set()
        answered = await asyncio.gather(first, second, third, return_exceptions=True)
        assert 2 == sum(not isinstance(answer, BaseException) for answer in answered)
        assert 0 == client.in_flight


async def test_a_request_that_is_too_large_is_refused_and_the_limit_named(front_end):
    async with front_end.open(a_graph(), max_body_bytes=1000) as client:
        with pytest.raises(RequestTooLarge, match="1000 bytes .limit 'max_body_bytes'"):
            await client.infer({"x": np.zeros(1000, np.float32)})
        assert 0 == client.in_flight


async def test_more_tensors_than_allowed_are_refused_and_the_limit_named(front_end):
    async with front_end.open(two_inputs(), max_tensors=1) as client:
        with pytest.raises(InvalidRequest, match=r"2 inputs .limit 'max_tensors' = 1"):
            await client.infer({"a": X, "b": X})


async def test_requests_side_by_side_never_mix(front_end):
    async with front_end.open(a_graph(echo, shape=(-1, 2))) as client:
        arrays = [np.full((1 + n % 3, 2), n, np.float32) for n in range(60)]
        replies = await asyncio.gather(*(client.infer({"x": array}, id=str(n)) for n, array in enumerate(arrays)))

    assert [str(n) for n in range(60)] == [reply.id for reply in replies]
    assert [array.tolist() for array in arrays] == [reply.outputs["y"].tolist() for reply in replies]


async def test_inputs_cannot_be_changed_by_a_step(front_end):
    def write(value):
        value["x"][0] = 5
        return {"y": value["x"]}

    async with front_end.open(a_graph(write)) as client:
        with pytest.raises(StepFailed, match="read-only"):
            await client.infer({"x": X})


async def test_the_error_types_of_shapes_and_datatypes_are_invalid_requests():
    assert issubclass(DatatypeMismatch, InvalidRequest)


@pytest.mark.parametrize("version", ["1", "2"])
async def test_a_version_is_a_branch_of_a_model_router(front_end, version):
    branches = {"v1": lambda value: {"y": value["x"] * 1}, "v2": lambda value: {"y": value["x"] * 2}}
    graph = Graph("g", {"x": ("FP32", [-1])}).to(routers.Model(branches, "version"), "test").respond()
    async with front_end.open(graph) as client:
        reply = await client.infer({"x": X}, version=version)
        assert (version, f"v{version}") == (reply.version, reply.parameters["test.variant"])
        assert (X * int(version)).tolist() == reply.outputs["y"].tolist()
        with pytest.raises(GraphNotFound, match="version 3 is not found; there are 1, 2"):
            await client.infer({"x": X}, version="3")


async def test_a_route_behind_the_models_name_is_a_branch_of_a_model_router(front_end):
    branches = {"same": echo, "twice": lambda value: {"y": value["x"] * 2}}
    graph = Graph("g", {"x": ("FP32", [-1])}).to(routers.Model(branches), "test").respond()
    async with front_end.open(graph) as client:
        for version in ("", "1"):
            reply = await client.infer({"x": X}, model="g/routes/twice", version=version)
            assert ("g", [2.0, 4.0]) == (reply.model, reply.outputs["y"].tolist())
        with pytest.raises(GraphNotFound, match="did you mean 'twice'"):
            await client.infer({"x": X}, model="g/routes/twise")
    async with front_end.open(a_graph()) as client:
        with pytest.raises(GraphNotFound, match="has no routes"):
            await client.infer({"x": X}, model="g/routes/twice")


async def test_a_route_in_a_parameter_is_a_branch_of_a_model_router(front_end):
    branches = {"same": echo, "twice": lambda value: {"y": value["x"] * 2}}
    graph = Graph("g", {"x": ("FP32", [-1])}).to(routers.Model(branches), "test").respond()
    async with front_end.open(graph) as client:
        assert [2.0, 4.0] == (await client.infer({"x": X}, parameters={"route": "twice"})).outputs["y"].tolist()
        with pytest.raises(GraphNotFound, match="did you mean 'twice'"):
            await client.infer({"x": X}, parameters={"route": "twise"})
