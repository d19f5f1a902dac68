"""How failures of graphs are logged."""

import logging

from servinggraph import Graph
from servinggraph.errors import StepFailed
from servinggraph.lifecycle.failures import FailureLog


def test_a_node_that_fails_every_request_is_logged_once_a_second_and_counted(caplog):
    now = 100.0
    log = FailureLog(lambda: now)
    for _ in range(50):
        log.report("g", "r", StepFailed("broken").at("n"))
    log.report("g", "r", StepFailed("broken").at("other"))
    now = 101.5
    log.report("g", "r", StepFailed("broken").at("n"))
    assert ["g' request 'r': node 'n': broken", "g' request 'r': node 'other': broken"] == [
        record.getMessage().removeprefix("graph '") for record in caplog.records[:2]
    ]
    assert caplog.records[2].getMessage().endswith("(and 49 more since the last line)")


def test_a_failure_is_logged_with_its_traceback_and_a_callers_mistake_is_not(caplog):
    def fail(value):
        raise KeyError("age")

    graph = Graph("g", inputs={"x": ("FP32", [-1])})
    graph.to(fail).respond()
    with caplog.at_level(logging.ERROR), graph.mock() as server:
        body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}'
        assert 500 == server.request("POST", "/v2/models/g/infer", body).status
        assert 400 == server.request("POST", "/v2/models/g/infer", b"{}").status
    (record,) = caplog.records
    assert "node 'fail': KeyError: 'age'" in record.getMessage()
    assert record.exc_info is not None
