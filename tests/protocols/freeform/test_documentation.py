"""docs/freeform.md is true: its client for arrays and the server understand each other."""

import re
from pathlib import Path

import msgpack
import numpy as np
import pytest

from servinggraph.protocols.freeform import bounds
from servinggraph.protocols.freeform.packing import ARRAY, decode_msgpack, encode_msgpack

PAGE = (Path(__file__).parents[3] / "docs" / "freeform.md").read_text()


@pytest.mark.parametrize("array", [np.arange(6, dtype="f4").reshape(2, 3), np.array(True), np.zeros((0, 2), "i8")], ids=str)
def test_the_client_of_the_page_speaks_with_the_server(array):
    client = {}
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(program, client)

    there = decode_msgpack(msgpack.packb(array, default=client["pack"]))
    back = msgpack.unpackb(encode_msgpack(there), ext_hook=client["unpack"])

    assert array.dtype == back.dtype
    assert array.tolist() == back.tolist()
    assert array.shape == back.shape


def test_the_numbers_of_the_page_are_those_of_the_code():
    assert f"Extension type **{ARRAY}**" in PAGE
    assert f"at most {bounds.MAX_NESTING} levels" in PAGE
    assert f"{bounds.MAX_CONTAINERS:,} arrays\nand objects" in PAGE
    assert f"{bounds.MAX_CELLS:,} cells" in PAGE
