"""Every error code has a gRPC status, and its text fits."""

import grpc

from servinggraph.errors import ErrorCode, InvalidRequest
from servinggraph.protocols.grpc.status import GRPC_STATUS, status_of


def test_every_error_code_has_a_status():
    assert set(ErrorCode) == set(GRPC_STATUS)
    assert grpc.StatusCode.OK not in GRPC_STATUS.values()


def test_a_text_that_utf8_cannot_carry_is_sent_all_the_same():
    assert (grpc.StatusCode.INVALID_ARGUMENT, "bad ? name") == status_of(InvalidRequest("bad \ud800 name"))


def test_a_long_text_is_cut_to_what_a_header_holds():
    _, text = status_of(InvalidRequest("☃" * 10_000))

    assert text.endswith("☃...")
    assert len(text.encode()) < 2100
