"""Every error code has an HTTP status, and every error a body that clients can read."""

import json

from servinggraph.errors import ErrorCode, InvalidRequest, LimitExceeded, StepFailed, Unavailable, Unsupported
from servinggraph.protocols.http.status import HTTP_STATUS, error_response


def test_every_error_code_has_a_status():
    assert set(ErrorCode) == set(HTTP_STATUS)
    assert all(400 <= status < 600 for status in HTTP_STATUS.values())


def test_an_error_is_json_without_a_charset():
    status, headers, body = error_response(InvalidRequest("é \ud800"))

    assert 400 == status
    assert [(b"content-type", b"application/json")] == headers
    assert {"error": "é ?"} == json.loads(body)


def test_what_may_succeed_later_says_when():
    for error in (LimitExceeded("full"), Unavailable("stopping")):
        status, headers, _ = error_response(error)
        assert 503 == status
        assert (b"retry-after", b"1") in headers


def test_the_node_is_named_and_what_is_not_offered_names_what_is():
    assert {"error": "node 'n': broken"} == json.loads(error_response(StepFailed("broken").at("n"))[2])
    assert (b"accept-encoding", b"gzip, deflate") in error_response(Unsupported("br"))[1]
