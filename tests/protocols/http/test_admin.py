"""/admin: graphs and routers read and changed over HTTP, and the audit log; feedback."""

from __future__ import annotations

import json

import pytest

from servinggraph import Graph, routers


def a(value):
    return {"y": value["x"]}


def b(value):
    return {"y": -value["x"]}


def a_graph():
    return Graph("g", {"x": ("FP32", [-1])}).to(routers.Ab({"a": a, "b": b}, {"a": 1, "b": 1}), "test").respond()


PATH = "/admin/graphs/g/routers/test"


def test_a_router_is_read_and_changed(http_server):
    with a_graph().mock() as server:
        (graph,) = server.request("GET", "/admin/graphs").json()
        assert ("g", "1", True, ["test", "test.a", "test.b"]) == (
            graph["graph"],
            graph["version"],
            graph["ready"],
            [node["name"] for node in graph["nodes"]],
        )
        assert graph == server.request("GET", "/admin/graphs/g").json()
        (router,) = server.request("GET", "/admin/graphs/g/routers").json()
        assert router == server.request("GET", PATH).json()
        assert ({"weights": {"a": 1.0, "b": 1.0}}, 0) == (router["settings"], router["revision"])
        change = {"settings": {"weights": {"a": 1}}, "who": "ann", "why": "b is slow", "revision": 0}
        changed = server.request("PATCH", PATH, json.dumps(change).encode())
        assert (200, {"weights": {"a": 1, "b": 0.0}}, 1) == (
            changed.status,
            changed.json()["settings"],
            changed.json()["revision"],
        )
        conflict = server.request("PATCH", PATH, json.dumps(change).encode())
        assert (409, True) == (conflict.status, "at revision 1, not 0" in conflict.json()["error"])
        (entry,) = server.request("GET", "/admin/audit?graph=g&node=test&limit=5").json()
        assert ("ann", "b is slow") == (entry["who"], entry["why"])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        ("GET", "/admin/graphs/x", b"", 404, "'x' is not found"),
        ("GET", "/admin/graphs/g/routers/tset", b"", 404, "did you mean 'test'"),
        ("PATCH", PATH, b"{}", 400, "settings"),
        ("PATCH", PATH, b"[]", 400, "object at the top"),
        ("PATCH", PATH, b'{"settings": {"weights": {"z": 1}}}', 400, "no branch"),
        ("PATCH", PATH, b'{"settings": {"weights": {"a": 1}}, "wo": 1}', 400, "settings"),
        ("PATCH", PATH, b'{"settings": {"weights": {"a": 1}}, "revision": "1"}', 400, "whole number"),
        (
            "PATCH",
            PATH,
            b'{"settings": {"weights": {"a": 1}}, "why": "%s"}' % (b"x" * 5000),
            400,
            "5000 characters, 4096 at most",
        ),
        ("POST", PATH, b"{}", 405, "Method Not Allowed"),
        ("GET", "/admin/audit?limit=all", b"", 400, "whole number"),
        ("GET", "/admin/audit?limit=%C2%B2", b"", 400, "whole number"),  # a digit, but no number
        ("POST", "/v2/models/g/feedback", b"{}", 400, "needs the 'id'"),
        ("POST", "/v2/models/g/feedback", b'{"id": "r"}', 400, "one of the two"),
        ("POST", "/v2/models/g/feedback", b'{"id": "r", "reward": true}', 400, "number"),
        ("POST", "/v2/models/g/feedback", b'{"id": "r", "rewards": 1}', 400, "unknown key 'rewards'"),
        ("POST", "/v2/models/g/feedback", b'{"id": "r", "truth": 1}', 400, "no router that could use"),
        ("POST", "/v2/models/g/feedback", b'{"id": "r", "reward": 1}', 404, "request 'r' is not known"),
        ("POST", "/v2/models/h/feedback", b'{"id": "r", "reward": 1}', 404, "'h' is not found"),
    ],
)
def test_bad_requests_are_refused_in_words(method, path, body, status, text):
    with a_graph().mock() as server:
        reply = server.request(method, path, body)
    assert (status, True) == (reply.status, text in reply.json()["error"])


def test_a_token_is_asked_for_where_there_is_one():
    with a_graph().mock(admin_token="secret") as server:
        assert 401 == server.request("GET", "/admin/graphs").status
        assert 401 == server.request("GET", "/admin/graphs", headers={"Authorization": "Bearer no"}).status
        assert 200 == server.request("GET", "/admin/graphs", headers={"Authorization": "Bearer secret"}).status
        assert 200 == server.request("GET", "/v2").status


def test_admin_may_be_off_and_feedback_still_there():
    with a_graph().mock(admin="off") as server:
        assert 404 == server.request("GET", "/admin/graphs").status
        assert 400 == server.request("POST", "/v2/models/g/feedback", b"{}").status
