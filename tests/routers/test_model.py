"""The model router: requests name the branch that answers, by path, version, header, parameter, tensor or field."""

from __future__ import annotations

import json

import numpy as np
import pytest

from servinggraph import Graph, InvalidRequest, routers
from servinggraph.errors import GraphInvalid, GraphNotFound

X = np.array([1.0], np.float32)


def times(factor):
    return lambda value: {"y": value["x"] * np.float32(factor)}


def a_graph(by="path", names=("one", "two"), version=1, **options):
    branches = {name: times(number) for number, name in enumerate(names, 1)}
    return Graph("g", {"x": ("FP32", [-1])}, version=version).to(routers.Model(branches, by, **options), "test").respond()


def post(server, path, parameters=None):
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}], "parameters": parameters or {}}
    return server.request("POST", f"/v2/models/g{path}", json.dumps(body).encode())


def test_the_url_names_the_branch():
    with a_graph().mock() as server:
        for number, name in enumerate(("one", "two"), 1):
            for path in (f"/routes/{name}/infer", f"/versions/1/routes/{name}/infer"):
                reply = post(server, path).json()
                assert ([number], {"test.variant": name}) == (reply["outputs"][0]["data"], reply["parameters"])
        assert {"one": 2, "two": 2} == server.router("test").report()["decisions"]


@pytest.mark.parametrize("operation", ["infer_stream", "generate_stream", "generate", "invocations"])
def test_every_way_to_ask_takes_a_route(operation):
    bodies = {
        "infer_stream": {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}]},
        "invocations": {"x": [1.0]},
    }
    body = json.dumps(bodies.get(operation, {"x": 1.0})).encode()
    with a_graph().mock() as server:
        answer = server.request("POST", f"/v2/models/g/routes/two/{operation}", body, {"content-type": "application/json"})
        assert (200, True) == (answer.status, b"2.0" in answer.body), answer.body
        assert {"one": 0, "two": 1} == server.router("test").report()["decisions"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/routes/tow/infer", "no branch is called 'tow' (by path); did you mean 'two'? There are: one, two"),
        ("/routes/zzz/infer", "no branch is called 'zzz' (by path). There are: one, two"),
        ("/infer", "the request names no branch (by path). There are: one, two"),
        ("/versions/7/routes/one/infer", "version 7 is not found"),
        ("/routes/one/infre", "Not Found"),
        ("/routes//infer", "Not Found"),
    ],
)
def test_a_route_that_there_is_not_is_404_with_the_choices(path, text):
    with a_graph().mock() as server:
        answer = post(server, path)
        assert (404, True) == (answer.status, text in answer.json()["error"]), answer.body


def test_a_graph_without_such_a_router_has_no_routes():
    with a_graph("parameter:m").mock() as server:
        answer = post(server, "/routes/one/infer")
        assert (404, True) == (answer.status, "has no routes" in answer.json()["error"])


def test_a_route_may_stand_in_a_parameter_but_not_another_than_in_the_url():
    with a_graph().mock() as server:
        assert [2.0] == server.infer(x=X, parameters={"route": "two"}).outputs["y"].tolist()
        assert 200 == post(server, "/routes/two/infer", {"route": "two"}).status
        answer = post(server, "/routes/two/infer", {"route": "one"})
        assert (400, True) == (answer.status, "'two', its parameter 'one'" in answer.json()["error"])


def test_versions_are_those_of_the_model():
    with a_graph("version", ("v1", "v2", "v10"), version=2, default="v2").mock() as server:
        for version, number in (("1", 1), ("2", 2), ("10", 3)):
            reply = post(server, f"/versions/{version}/infer").json()
            assert ([number], version) == (reply["outputs"][0]["data"], reply["model_version"])
            for path in ("/ready", "/config", "/stats", ""):
                assert 200 == server.request("GET", f"/v2/models/g/versions/{version}{path}").status
        assert [2.0] == post(server, "/infer").json()["outputs"][0]["data"]
        assert ["1", "2", "10"] == server.request("GET", "/v2/models/g").json()["versions"]
        answer = post(server, "/versions/3/infer")
        assert (404, True) == (answer.status, "version 3 is not found; there are 1, 2, 10" in answer.json()["error"])
        assert [3.0] == server.infer(x=X, parameters={"version": 10}).outputs["y"].tolist()


def test_the_graphs_own_version_is_none_of_the_routers():
    with a_graph("version", ("a", "b"), version=7, aliases={"1": "a", "2": "b"}).mock() as server:
        answer = post(server, "/versions/7/infer")
        assert (404, "no branch is called '7' (by version). There are: 1, 2") == (
            answer.status,
            answer.json()["error"].partition(": ")[2],
        )
        assert "names no branch (by version)" in post(server, "/infer").json()["error"]


@pytest.mark.parametrize(
    ("by", "asked"),
    [
        ("header:X-Model", {"headers": {"x-model": "two"}}),
        ("parameter:model", {"parameters": {"model": "two"}}),
        ("tensor:x", {}),
    ],
)
def test_other_places_name_the_branch(by, asked):
    with a_graph(by, aliases={"1.0": "two"} if by == "tensor:x" else {}).mock() as server:
        assert [2.0] == server.infer(x=X, **asked).outputs["y"].tolist()


def test_a_field_of_a_body_names_the_branch():
    branches = {"de": lambda body: "hallo", "en": lambda body: "hello"}
    graph = Graph("g", "body").to(routers.Model(branches, "field:user.language", default="en"), "test").respond()
    with graph.mock() as server:
        assert "hallo" == server.invoke({"user": {"language": "de"}})
        assert "hello" == server.invoke({"user": {}})
        with pytest.raises(GraphNotFound, match=r"no branch is called 'fr' \(by field:user.language\). There are: de, en"):
            server.invoke({"user": {"language": "fr"}})


def test_the_default_answers_what_names_no_branch_and_the_unknown_only_where_that_is_said():
    with a_graph("parameter:m", default="one").mock() as server:
        assert [1.0] == server.infer(x=X).outputs["y"].tolist()
        with pytest.raises(GraphNotFound):
            server.infer(x=X, parameters={"m": "three"})
        assert 1 == server.router("test").report()["refused"]
    with a_graph("parameter:m", default="one", unknown="default").mock() as server:
        assert [1.0] == server.infer(x=X, parameters={"m": "three"}).outputs["y"].tolist()


def test_aliases_and_default_change_while_it_serves():
    with a_graph("parameter:m", aliases={"champion": "one"}).mock() as server:
        assert [1.0] == server.infer(x=X, parameters={"m": "champion"}).outputs["y"].tolist()
        changed = {"aliases": {"champion": "two", "old": "one"}, "default": "two"}
        assert changed == server.adjust("test", changed)
        assert [2.0] == server.infer(x=X, parameters={"m": "champion"}).outputs["y"].tolist()
        assert [2.0] == server.infer(x=X).outputs["y"].tolist()
        for wrong in ({"aliases": {"a": "zwei"}}, {"aliases": 3}, {"aliases": {"two": "one"}}, {"default": 3}, {"by": "path"}):
            with pytest.raises(InvalidRequest):
                server.adjust("test", {"default": "one", **wrong})
        assert changed == server.router("test").settings()


def test_versions_lead_elsewhere_but_none_comes_or_goes():
    with a_graph("version", aliases={"1": "one"}, names=("one", "v2")).mock() as server:
        server.adjust("test", {"aliases": {"1": "v2"}})
        assert [2.0] == post(server, "/versions/1/infer").json()["outputs"][0]["data"]
        with pytest.raises(InvalidRequest, match="versions that a graph takes are fixed"):
            server.adjust("test", {"aliases": {"3": "v2"}})


def test_an_error_among_thousands_of_branches_is_short_and_names_the_nearest():
    names = [f"model-{number}" for number in range(3000)]
    shared = times(1)
    graph = Graph("g", {"x": ("FP32", [-1])})
    graph.to(routers.Model({name: shared for name in names}, "parameter:m"), "test").respond()
    with graph.mock() as server:
        assert "model-2999" == server.infer(x=X, parameters={"m": "model-2999"}).parameters["test.variant"]
        with pytest.raises(GraphNotFound, match=r"did you mean 'model-\d+'.*model-19 and 2980 more$") as failure:
            server.infer(x=X, parameters={"m": "modle-12"})
        assert len(str(failure.value)) < 500
        with pytest.raises(GraphNotFound) as failure:
            server.infer(x=X, parameters={"m": "m" * 10_000})
        assert len(str(failure.value)) < 500


def test_it_stands_in_an_ensemble_and_behind_another():
    inner = routers.Model({"a": times(1), "b": times(3)}, "parameter:inner", default="a")
    outer = routers.Model({"plain": times(5), "mixed": routers.Ensemble({"m": inner, "n": times(1)})}, "path")
    with Graph("g", {"x": ("FP32", [-1])}).to(outer, "test").respond().mock() as server:
        reply = post(server, "/routes/mixed/infer", {"inner": "b"}).json()
        assert ([2.0], "b") == (reply["outputs"][0]["data"], reply["parameters"]["test.mixed.m.variant"])


@pytest.mark.parametrize(
    ("by", "options", "text"),
    [
        ("cookie:x", {}, "'by' is path, version, or the place of a key"),
        ("id", {}, "tells requests apart"),
        ("path", {"default": "tow"}, "did you mean 'two'"),
        ("path", {"aliases": {"x": "tow"}}, "did you mean 'two'"),
        ("path", {"aliases": {"one": "two"}}, "is the name of a branch"),
        ("path", {"unknown": "default"}, "needs 'default'"),
        ("version", {}, "'one' is no version"),
        ("version", {"aliases": {"first": "one", "2": "two"}}, "'first' is no version"),
        ("version", {"names": ("v1", "1")}, "version 1 is both"),
        ("path", {"batch": {"max_rows": 4}}, "decides for each request"),
    ],
)
def test_definitions_that_cannot_work_are_refused(by, options, text):
    with pytest.raises(GraphInvalid, match=text):
        a_graph(by, **options).compile()
