"""The V2 inference protocol (Open Inference Protocol) with Triton's binary extension, without I/O.

`request` and `response` turn bytes into messages and back; `json_data` and `binary_data`
do so for single tensors; `checks` holds a request against what a graph declares.
Source: Open Inference Protocol, and Triton's extension_binary_data, extension_parameters.
"""

from servinggraph.protocols.v2.metadata import model_metadata, server_metadata
from servinggraph.protocols.v2.request import RequestLimits, parse_request
from servinggraph.protocols.v2.response import EncodedResponse, encode_response

__all__ = [
    "EncodedResponse",
    "RequestLimits",
    "encode_response",
    "model_metadata",
    "parse_request",
    "server_metadata",
]
