"""Bodies that are not V2, without I/O: JSON documents, msgpack, text, CSV, and bytes of any kind.

`body` turns bytes into a value by their content type, `answer` a value into bytes by what the
caller accepts; `documents` (JSON), `packing` (msgpack) and `table` (CSV) do so for one format;
`tensors` makes the declared tensors of a graph out of a value. docs/freeform.md is the
description for users.
"""

from servinggraph.protocols.freeform.answer import Encoded, encode_answer
from servinggraph.protocols.freeform.body import decode_body
from servinggraph.protocols.freeform.tensors import decode_tensors

__all__ = ["Encoded", "decode_body", "decode_tensors", "encode_answer"]
