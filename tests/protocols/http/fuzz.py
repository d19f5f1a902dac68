"""Fuzzes V2 requests against the ASGI application in process, and holds every answer against an oracle.

    python tests/protocols/http/fuzz.py --inputs 200000 --seed 1

Seeds are the files of `corpus/`: headers, an empty line, the body; the file name begins with the
graph. `--write-corpus` makes them anew. A finding is printed with its input and ends the run with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import gzip
import importlib.util
import json
import random
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from servinggraph import Graph
from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import Serving
from servinggraph.protocols.http.server import make_asgi

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
LIMIT = 60_000
INPUT_TIMEOUT_S = 60.0
GROWTH_MIB = 64

_SPEC = importlib.util.spec_from_file_location("fuzz_oracle", HERE / "oracle.py")
assert _SPEC is not None
assert _SPEC.loader is not None
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

GRAPHS: dict[str, dict[str, tuple[str, list[int], bool]]] = {
    "numbers": {"x": ("FP32", [-1, 2], False)},
    "text": {"s": ("BYTES", [-1], False)},
    "brain": {"h": ("BF16", [-1, -1], False)},
    "many": {
        "a": ("FP64", [-1], False), "b": ("INT64", [-1, 2], True), "c": ("BOOL", [-1], True), "d": ("UINT8", [-1], True),
        "e": ("UINT64", [-1], True), "f": ("FP16", [-1], True), "g": ("INT8", [2], True), "t": ("BYTES", [-1, 1], True), "z": ("INT32", [], True),
    },
}  # fmt: skip

Headers = dict[str, str]
Case = tuple[str, Headers, bytes]

NUMBERS = ["0", "-0", "1", "-1", "127", "128", "255", "256", "300", "2147483648", "9007199254740993", "9223372036854775807",
           "9223372036854775808", "18446744073709551615", "18446744073709551616", "-9223372036854775809", "1.0", "0.1", "1e5", "65504", "65520",
           "3.4028235e38", "3.5e38", "1e39", "1e308", "1e309", "-1e400", "1e-400", "NaN", "Infinity", "-Infinity", "9" * 30, "9" * 5000, "01", "+1", ".5", "1."]  # fmt: skip
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2, 2**31, 2**53 + 1, 2**63, 2**64 - 1, 0.0, 0.5, "", "a", "x", "FP32", "BYTES", "é ☃ 😀", "null",
                     "NaN", [], {}, [[]], [1, 2], [1, [2]], {"a": 1}, {"name": "x"}, {"binary_data_size": 8}, {"binary_data": True}]  # fmt: skip
KEYS = ["id", "inputs", "outputs", "parameters", "name", "datatype", "shape", "data", "binary_data_size", "binary_data", "binary_data_output", "timeout",
        "priority", "classification", "shared_memory_region", "triton_x", "x", "s", "h", "a"]  # fmt: skip
TOKENS = [b"NaN", b"null", b"true", b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\u0000", b"\\ud800", b"\xed\xa0\x80", b"\xff", b"\0", b"\\", b"[" * 50, b"[" * 120, b"[" * 3000,
          b'{"a":' * 40, b"\xef\xbb\xbf", b"\x1f\x8b", b"\xe2\x98\x83", b"-", b"e9", b"0" * 50, b"1" * 400, b'"id":"a",', b'"inputs":[],', b'"data":[1,2],']  # fmt: skip


def seeds() -> Iterator[tuple[str, Headers, bytes]]:
    """Make the seed corpus: each datatype and each form of a request, valid."""
    arrays: dict[str, Any] = {
        "a": np.array([0.5, -1e300]), "b": np.array([[1, -(2**63)]], np.int64), "c": np.array([True, False]), "d": np.array([0, 255], np.uint8),
        "e": np.array([2**64 - 1], np.uint64), "f": np.array([0.5, -65504], np.float16), "g": np.array([-128, 127], np.int8),
        "t": ["é"], "z": np.array(-5, np.int32), "x": np.array([[1.5, -2.5], [0, 3e38]], np.float32), "s": ["text", "", "null \0"], "h": None,
    }  # fmt: skip

    def tensor(name: str, datatype: str, *, binary: bool) -> tuple[dict[str, Any], bytes]:
        if datatype == "BYTES":
            items = arrays[name]
            shape, data = ([len(items)] if name == "s" else [len(items), 1]), items
            raw = b"".join(len(item.encode()).to_bytes(4, "little") + item.encode() for item in items)
        elif datatype == "BF16":
            shape, data, raw = [1, 2], [1.5, -0.25], b"\xc0\x3f\x80\xbe"
        else:
            array = arrays[name]
            shape, data, raw = list(array.shape), array.tolist(), array.tobytes()
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if binary:
            return {**entry, "parameters": {"binary_data_size": len(raw)}}, raw
        return {**entry, "data": data if isinstance(data, list) else [data]}, b""

    for graph, declared in GRAPHS.items():
        for form in ("json", "binary", "mixed", "outputs"):
            entries, raws = [], b""
            for number, (name, (datatype, _, _)) in enumerate(declared.items()):
                entry, raw = tensor(name, datatype, binary=form == "binary" or (form == "mixed" and number % 2 == 0))
                entries.append(entry)
                raws += raw
            document: dict[str, Any] = {"id": "r-1", "inputs": entries}
            if form == "mixed":
                document["parameters"] = {"binary_data_output": True, "priority": 1, "timeout": 60_000_000, "p": "text"}
            if form == "outputs":
                names = list(declared)
                document["outputs"] = [
                    {"name": name, "parameters": {"binary_data": at % 2 == 0}} for at, name in enumerate(names)
                ]
            text = json.dumps(document).encode()
            headers = {"inference-header-content-length": str(len(text))} if raws else {}
            yield f"{graph}-{form}", headers, text + raws
            yield (
                f"{graph}-{form}-gzip",
                {**headers, "content-encoding": "gzip", "accept-encoding": "gzip"},
                gzip.compress(text + raws, mtime=0),
            )
    yield "numbers-deflate", {"content-encoding": "deflate", "accept-encoding": "deflate"}, zlib.compress(b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[[NaN,-Infinity]]}]}')  # fmt: skip
    yield "numbers-raw", {"inference-header-content-length": "0"}, bytes(8)
    yield "text-raw", {"inference-header-content-length": "0"}, b"any bytes \xff"
    yield "brain-raw", {"inference-header-content-length": "0"}, bytes(6)
    yield (
        "numbers-timeout",
        {"x-request-timeout-ms": "60000"},
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[0,2],"data":[]}]}',
    )
    yield (
        "numbers-escapes",
        {},
        rb'{"id":"\u00e9\ud83d\ude00","inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[NaN,1]}]}',
    )
    yield "text-twice", {}, b'{"inputs":[{"name":"s","datatype":"BYTES","shape":[1],"data":["a"]}],"outputs":[{"name":"s"},{"name":"s","parameters":{"binary_data":true}}]}'  # fmt: skip
    yield "many-few", {}, b'{"inputs":[{"name":"a","datatype":"FP64","shape":[3],"data":[1,2.5,1e308]}],"outputs":[]}'


def write_corpus() -> None:
    CORPUS.mkdir(exist_ok=True)
    for name, headers, body in seeds():
        head = "".join(f"{key}: {value}\n" for key, value in headers.items())
        (CORPUS / name).write_bytes(head.encode() + b"\n" + body)


def read_corpus() -> list[Case]:
    cases = []
    for path in sorted(CORPUS.iterdir()):
        head, _, body = (
            path.read_bytes().partition(b"\n\n")
            if not path.read_bytes().startswith(b"\n")
            else (b"", b"", path.read_bytes()[1:])
        )
        headers = dict(line.split(": ", 1) for line in head.decode().splitlines())
        cases.append((path.name.partition("-")[0], headers, body))
    return cases


class Mutator:
    """Makes new inputs of old ones."""

    def __init__(self, random_numbers: random.Random, cases: list[Case]) -> None:
        self._random = random_numbers
        self._cases = cases

    def next(self) -> Case:
        rng = self._random
        graph, headers, body = rng.choice(self._cases)
        headers = dict(headers)
        coding = headers.get("content-encoding")
        if coding and rng.random() < 0.7:  # mutate what is inside
            body = gzip.decompress(body) if coding == "gzip" else zlib.decompress(body)
        else:
            coding = None
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            body = self._mutated(headers, body)
        if coding:
            body = gzip.compress(body, 1) if coding == "gzip" else zlib.compress(body, 1)
        if rng.random() < 0.02:
            graph = rng.choice(list(GRAPHS))
        if rng.random() < 0.08:
            self._mutate_headers(headers, body)
        return graph, headers, body

    def _mutated(self, headers: Headers, body: bytes) -> bytes:
        rng = self._random
        length = headers.get("inference-header-content-length", "")
        at = int(length) if length.isdigit() and 0 < int(length) <= len(body) else len(body)
        text, rest = body[:at], body[at:]
        kind = rng.random()
        if kind < 0.45 and (structured := self._structure(text)) is not None:
            new = structured
        elif kind < 0.65:
            new = self._bytes(text)
        elif kind < 0.75:
            new = self._number(text)
        elif kind < 0.9 and rest:
            return text + self._bytes(rest)
        else:
            return self._bytes(body)
        if rest and length and rng.random() < 0.95:
            headers["inference-header-content-length"] = str(len(new))
        return new + rest

    def _bytes(self, data: bytes) -> bytes:
        rng = self._random
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 30)))
        choice = rng.randrange(8)
        if choice == 0:
            return data[:at]
        if choice == 1:
            return data[:at] + data[end:]
        if choice == 2:
            return data[:at] + data[at:end] * rng.choice((2, 3, 50)) + data[end:]
        if choice == 3:
            return data[:at] + rng.choice(TOKENS) + data[at:]
        if choice == 4:
            return data[:at] + rng.choice(TOKENS) + data[end:]
        if choice == 5:
            return data[:at] + rng.randbytes(end - at) + data[end:]
        if choice == 6 and at < len(data):
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        return data + rng.randbytes(rng.choice((1, 2, 4, 8, 100)))

    def _number(self, text: bytes) -> bytes:
        """Put another number where one stands."""
        places = [at for at, byte in enumerate(text) if 48 <= byte <= 57]
        if not places:
            return text
        begin = end = self._random.choice(places)
        while begin and text[begin - 1 : begin] in b"0123456789.-+eE":
            begin -= 1
        while text[end : end + 1] and text[end : end + 1] in b"0123456789.-+eE":
            end += 1
        return text[:begin] + self._random.choice(NUMBERS).encode() + text[end:]

    def _structure(self, text: bytes) -> bytes | None:
        """Change the document: a value, a key, a place, a copy, a level more or less."""
        rng = self._random
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            return None
        places: list[tuple[Any, Any]] = []
        waiting = [document]
        while waiting:
            node = waiting.pop()
            for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
                places.append((node, key))
                waiting.append(value)
        if not places:
            return None
        holder, key = rng.choice(places)
        choice = rng.randrange(9)
        if choice == 0:
            del holder[key]
        elif choice == 1:
            holder[key] = rng.choice(VALUES)
        elif choice == 2:
            holder[key] = [holder[key]]
        elif choice == 3:
            other, other_key = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[other_key])) if other_key in other or isinstance(other, list) else None
        elif choice == 4 and isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        elif choice == 5 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = rng.choice(VALUES)
        elif choice == 6 and isinstance(holder[key], list):
            holder[key] = holder[key] * rng.choice((0, 2, 3)) if len(holder[key]) < 500 else []
        elif choice == 7 and isinstance(holder[key], list):
            rng.shuffle(holder[key])
        else:
            holder[key] = rng.choice((None, [], {}, rng.choice(VALUES)))
        written = json.dumps(document, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.05 and b"{" in written:  # a key twice
            at = written.index(b"{") + 1
            pair = json.dumps({rng.choice(KEYS): rng.choice(VALUES)})[1:-1].encode()
            written = written[:at] + pair + b", " + written[at:]
        return written

    def _mutate_headers(self, headers: Headers, body: bytes) -> None:
        rng = self._random
        name = rng.choice(
            (
                "inference-header-content-length",
                "inference-header-content-length",
                "content-encoding",
                "accept-encoding",
                "x-request-timeout-ms",
            )
        )
        values = {
            "inference-header-content-length": ["", "0", "-0", "+0", "-1", "1", "abc", "0x10", " 5 ", "9" * 19, "9" * 30, str(len(body)), str(len(body) + 1), str(len(body) - 1), "1.0", "1_0"],
            "content-encoding": ["", "gzip", "deflate", "GZIP", "identity", "br", "gzip, deflate", "x-gzip"],
            "accept-encoding": ["", "gzip", "deflate", "gzip;q=0", "*", "gzip;q=nan", ";;;", "identity;q=0, gzip;q=1e3"],
            "x-request-timeout-ms": ["", "0", "-1", "60000", "1e9", "1e99", "nan", "inf", "1_0", "60000.5", "0x1"],
        }[name]  # fmt: skip
        if rng.random() < 0.2:
            headers.pop(name, None)
        else:
            headers[name] = rng.choice(values)


class Findings(Exception):
    """What the fuzzer was looking for."""


class Target:
    """The application, and the judgement of what it answers."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()

    async def start(self) -> None:
        serving = Serving(FrontEndOptions(max_body_bytes=LIMIT, max_in_flight=16))
        self._catalog, self.admission = serving.catalog, serving.admission
        graphs = []
        for name, declared in GRAPHS.items():
            inputs = {
                tensor: {"datatype": datatype, "shape": shape, "optional": optional}
                for tensor, (datatype, shape, optional) in declared.items()
            }
            graphs.append(Graph(name, inputs).to(lambda value: {**value}, "echo").respond())
        await self._catalog.load([graph.compile() for graph in graphs])
        self._asgi = make_asgi(serving)

    async def stop(self) -> None:
        await self._catalog.stop()

    async def check(self, case: Case) -> None:
        """Send one request.

        Raises:
            Findings: its answer is wrong.
        """
        graph, headers, body = case
        status, answer_headers, answer = await self._ask(graph, headers, body)
        if self.admission.in_flight:
            raise Findings("a slot was not given back")
        verdict = "valid"
        try:
            want = oracle.expected(GRAPHS[graph], headers, body, LIMIT)
        except oracle.Invalid:
            verdict = "invalid"
        except oracle.Unclear:
            verdict = "unclear"
        self.statuses[f"{verdict} {status}"] += 1
        if status == 200:
            if verdict == "invalid":
                raise Findings(f"answered 200, and is not valid: {answer[:200]!r}")
            if verdict == "valid":
                answer = oracle.unpack(answer, answer_headers.get("content-encoding", ""), 10 * LIMIT)
                try:
                    wrong = oracle.difference(want, answer_headers, answer)
                except Exception as error:
                    wrong = f"unreadable ({type(error).__name__}: {error})"
                if wrong:
                    raise Findings(f"wrong answer: {wrong}: {answer[:300]!r}")
            return
        text = json.loads(answer)["error"]
        if verdict == "valid":
            raise Findings(f"is valid and was refused: {status} {text[:300]}")
        if status not in (400, 413, 501) and (verdict, status) != ("unclear", 504):
            raise Findings(f"status {status}: {text[:300]}")

    async def _ask(self, graph: str, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
        raw = [(name.encode("latin-1"), value.strip().encode("latin-1")) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": f"/v2/models/{graph}/infer", "headers": raw, "query_string": b""}
        sent: list[Any] = []
        bodies = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if bodies:
                return bodies.pop()
            return await asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            sent.append(message)

        try:
            async with asyncio.timeout(INPUT_TIMEOUT_S):
                await self._asgi(scope, receive, send)
        except TimeoutError:
            raise Findings("no answer") from None
        except Exception as error:
            raise Findings(f"no answer but {type(error).__name__}: {error}") from error
        if [message["type"] for message in sent] != ["http.response.start", "http.response.body"]:
            raise Findings(f"answered {len(sent)} messages")
        start, last = sent
        return start["status"], {name.decode(): value.decode() for name, value in start["headers"]}, last["body"]


def rss_mib() -> float:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


async def run(inputs: int, seed: int) -> str:
    """Fuzz; returns the line of results.

    Raises:
        Findings: with the input.
    """
    mutator = Mutator(random.Random(seed), read_corpus())
    target = Target()
    await target.start()
    begun = time.monotonic()
    slowest = 0.0
    settled = 0.0
    for number in range(inputs):
        case = mutator.next()
        at = time.monotonic()
        try:
            await target.check(case)
        except Findings as finding:
            raise Findings(
                f"input {number} of seed {seed}: {finding}\n  graph {case[0]}\n  headers {case[1]}\n  body {case[2][:3000]!r}"
            ) from finding
        slowest = max(slowest, time.monotonic() - at)
        if number % 100 == 0:
            await asyncio.sleep(0)  # the loop has to turn: it throws away timers that are over
        if number == inputs // 5:
            gc.collect()
            settled = rss_mib()
    gc.collect()
    growth = rss_mib() - settled
    if growth > GROWTH_MIB:
        raise Findings(f"memory grew by {growth:.0f} MiB")
    await target.stop()
    counts = ", ".join(f"{name}: {count}" for name, count in sorted(target.statuses.items()))
    seconds = time.monotonic() - begun
    return f"{inputs} inputs, seed {seed}, {seconds:.0f} s, slowest {slowest * 1e3:.0f} ms, memory {growth:+.1f} MiB; {counts}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write-corpus", action="store_true")
    arguments = parser.parse_args()
    if arguments.write_corpus:
        write_corpus()
        return 0
    try:
        print(asyncio.run(run(arguments.inputs, arguments.seed)))
    except Findings as finding:
        print(finding)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
