"""Fuzzes gRPC messages against the service in process, and holds every answer against an oracle.

    python tests/protocols/grpc/fuzz.py --inputs 100000 --seed 1

Every request goes through `ModelInfer`, and in groups through `ModelStreamInfer`, which has to say the
same; mutated bytes go to the other RPCs as well. A finding is printed with its input and ends the run with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc.service_pb2 as triton
from google.protobuf.message import DecodeError

from servinggraph import Graph
from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import Serving
from servinggraph.protocols.grpc.service import Service

HERE = Path(__file__).parent
LIMIT = 200_000
INPUT_TIMEOUT_S = 60.0
GROWTH_MIB = 64
TOGETHER = 8
REFUSED = {
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED,
}  # fmt: skip
OTHERS = ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "ServerMetadata", "ServerReady", "RepositoryIndex")

_SPEC = importlib.util.spec_from_file_location("grpc_fuzz_oracle", HERE / "oracle.py")
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
        "e": ("UINT64", [-1], True), "f": ("FP16", [-1], True), "g": ("INT8", [2], True), "t": ("BYTES", [-1, 1], True),
        "z": ("INT32", [], True), "u": ("UINT16", [-1], True), "v": ("INT16", [-1], True), "w": ("UINT32", [-1], True),
    },
}  # fmt: skip
ARRAYS: dict[str, Any] = {
    "x": np.array([[1.5, -2.5], [0, 3e38]], "<f4"), "s": [b"text", b"", b"\xff\0"], "h": np.array([[1, 2]], "<u2"),
    "a": np.array([0.5, -1e300]), "b": np.array([[1, -(2**63)]]), "c": np.array([True, False]), "d": np.array([0, 255], "u1"),
    "e": np.array([2**64 - 1], "<u8"), "f": np.array([0.5], "<f2"), "g": np.array([-128, 127], "i1"), "t": [b"e", b"f"],
    "z": np.array(-5, "<i4"), "u": np.array([65535], "<u2"), "v": np.array([-(2**15)], "<i2"), "w": np.array([2**32 - 1], "<u4"),
}  # fmt: skip
SIZES = [-(2**63), -1, 0, 1, 2, 3, 5, 2**31, 2**32, 2**40, 2**62, 2**63 - 1]
TEXTS = [
    "",
    "x",
    "s",
    "h",
    "a",
    "b",
    "numbers",
    "text",
    "many",
    "FP32",
    "BYTES",
    "INT8",
    "BF16",
    "1",
    "2",
    "01",
    "-1",
    "é ☃",
    "x" * 300,
    "triton_x",
]
KEYS = ["timeout", "priority", "p", "triton_x", "triton_enable_empty_final_response", "classification", "shared_memory_region",
        "shared_memory_byte_size", "content_type", "binary_data", ""]  # fmt: skip


def seeds() -> list[Any]:
    """Return valid requests: every datatype, raw and typed, small and above the size from which they are views."""
    made = []
    for model, declared in GRAPHS.items():
        for form in ("raw", "typed", "few", "outputs", "large"):
            message = triton.ModelInferRequest(model_name=model, id="r-1")
            names = [name for name, (_, _, optional) in declared.items() if form != "few" or not optional]
            typed = form == "typed" and all(declared[name][0] in oracle.TYPED for name in names)
            if form == "typed" and not typed:
                names = [name for name in names if declared[name][0] in oracle.TYPED]
                typed = bool(names)
            for name in names:
                add(message, name, declared[name][0], typed=typed, times=4_000 if form == "large" and name in "xsha" else 1)
            if form == "outputs":
                for name in reversed(names):
                    message.outputs.add(name=name)
                message.parameters["timeout"].int64_param = 60_000_000
                message.parameters["priority"].uint64_param = 1
                message.parameters["p"].string_param = "text"
                message.inputs[0].parameters["content_type"].string_param = "np"
            made.append(message)
    return made


def add(message: Any, name: str, datatype: str, *, typed: bool, times: int) -> None:
    array = ARRAYS[name]
    if datatype == "BYTES":
        items = array * times
        shape = [len(items)] if name == "s" else [len(items), 1]
        data = b"".join(len(item).to_bytes(4, "little") + item for item in items)
    else:
        array = np.concatenate([array] * times) if times > 1 else array
        shape, data, items = list(array.shape), array.tobytes(), array.ravel().tolist()
    entry = message.inputs.add(name=name, datatype=datatype, shape=shape)
    if typed:
        getattr(entry.contents, oracle.TYPED[datatype][0]).extend(items)
    else:
        message.raw_input_contents.append(data)


class Mutator:
    """Makes new inputs of old ones."""

    def __init__(self, random_numbers: random.Random, messages: list[Any]) -> None:
        self._random = random_numbers
        self._messages = messages

    def next(self) -> bytes:
        rng = self._random
        message = triton.ModelInferRequest()
        message.CopyFrom(rng.choice(self._messages))
        if len(message.raw_input_contents) and len(message.raw_input_contents[0]) > 9_000 and rng.random() < 0.7:
            message.CopyFrom(rng.choice(self._messages[:4]))  # large ones are slow, and few of them find as much
        for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3))):
            self._structure(message)
        data = message.SerializeToString()
        for _ in range(rng.choice((0, 0, 0, 0, 1, 2))):
            data = self.mutated(data)
        return data

    def _structure(self, message: Any) -> None:
        rng = self._random
        kind = rng.randrange(12)
        entry = rng.choice(message.inputs) if len(message.inputs) else message.inputs.add()
        if kind == 0:
            setattr(entry, rng.choice(("name", "datatype")), rng.choice(TEXTS))
        elif kind == 1:
            setattr(message, rng.choice(("model_name", "model_version", "id")), rng.choice(TEXTS))
        elif kind == 2 and len(entry.shape):
            entry.shape[rng.randrange(len(entry.shape))] = rng.choice(SIZES)
        elif kind == 3:
            entry.shape.extend(
                [rng.choice(SIZES)] * rng.choice((1, 1, 2, 70))
            ) if rng.random() < 0.5 else entry.shape.__delitem__(slice(0, 1))
        elif kind == 4:
            self._raw(message)
        elif kind == 5:
            self._typed(entry.contents)
        elif kind == 6:
            entry.ClearField(rng.choice(("contents", "shape", "name", "datatype")))
        elif kind == 7:
            parameters = rng.choice([message, entry, *message.outputs]).parameters
            self._parameter(parameters[rng.choice(KEYS)])
        elif kind == 8:
            message.outputs.add(name=rng.choice([*TEXTS, entry.name]))
        elif kind == 9:
            message.inputs.add().CopyFrom(entry) if rng.random() < 0.5 else message.inputs.remove(entry)
        elif kind == 10:
            order = list(message.inputs)
            rng.shuffle(order)
            copies = [type(one).FromString(one.SerializeToString()) for one in order]
            del message.inputs[:]
            message.inputs.extend(copies)
        else:
            entry.contents.SetInParent()

    def _raw(self, message: Any) -> None:
        rng = self._random
        raw = message.raw_input_contents
        if not raw or rng.random() < 0.2:
            raw.append(rng.randbytes(rng.choice((0, 1, 4, 8, 16))))
            return
        at = rng.randrange(len(raw))
        if rng.random() < 0.3:
            del raw[at]
        else:
            raw[at] = self.mutated(raw[at])

    def _typed(self, contents: Any) -> None:
        rng = self._random
        field, values = rng.choice(
            [
                ("bool_contents", [True, False]),
                ("int_contents", [0, 127, 128, -129, 2**31 - 1]),
                ("int64_contents", [0, -(2**63)]),
                ("uint_contents", [0, 255, 256, 65536]),
                ("uint64_contents", [2**64 - 1]),
                ("fp32_contents", [float("nan"), 1.5]),
                ("fp64_contents", [1e308]),
                ("bytes_contents", [b"", b"a\xff"]),
            ]  # fmt: skip
        )
        filled = [name.name for name, _ in contents.ListFields()]
        if filled and rng.random() < 0.6:
            elements = getattr(contents, rng.choice(filled))
            if rng.random() < 0.5 and len(elements):
                del elements[-1]
            elif len(elements):
                elements.append(elements[0])
        else:
            getattr(contents, field).append(rng.choice(values))

    def _parameter(self, parameter: Any) -> None:
        rng = self._random
        choice = rng.randrange(6)
        if choice == 0:
            parameter.bool_param = rng.random() < 0.5
        elif choice == 1:
            parameter.int64_param = rng.choice((0, 1, -1, 60_000_000, 2**63 - 1, -(2**63)))
        elif choice == 2:
            parameter.string_param = rng.choice(TEXTS)
        elif choice == 3:
            parameter.double_param = rng.choice((0.0, 1.5, float("nan")))
        elif choice == 4:
            parameter.uint64_param = rng.choice((0, 1, 2**64 - 1))

    def mutated(self, data: bytes) -> bytes:
        """Change bytes."""
        rng = self._random
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 30)))
        choice = rng.randrange(7)
        if choice == 0:
            return data[:at]
        if choice == 1:
            return data[:at] + data[end:]
        if choice == 2:
            return data[:at] + data[at:end] * rng.choice((2, 3, 50)) + data[end:]
        if choice == 3:
            return (
                data[:at]
                + rng.choice((b"\xff" * 10, b"\x80" * 11 + b"\1", b"\x0b", b"\x0c", b"\x3a\x00", b"\x00", b"\x07"))
                + data[at:]
            )
        if choice == 4:
            return data[:at] + rng.randbytes(end - at) + data[end:]
        if choice == 5 and at < len(data):
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        return data + rng.randbytes(rng.choice((1, 2, 4, 8)))


class Findings(Exception):
    """What the fuzzer was looking for."""


class Aborted(Exception):
    """A call ended with a status."""

    def __init__(self, status: grpc.StatusCode, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text


class Call:
    """What a handler is given, without a wire."""

    def __init__(self, messages: list[bytes] | None = None) -> None:
        self._messages = list(messages or ())
        self.written: list[bytes] = []
        self.code: grpc.StatusCode | None = None
        self.text = ""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, text: str) -> None:
        text.encode()  # as the wire does
        self.text = text

    async def abort(self, status: grpc.StatusCode, text: str) -> None:
        text.encode()  # as the wire does
        raise Aborted(status, text)

    async def read(self) -> Any:
        await asyncio.sleep(0)
        return self._messages.pop(0) if self._messages else grpc.aio.EOF

    async def write(self, message: bytes) -> None:
        await asyncio.sleep(0)
        self.written.append(message)

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()


class Target:
    """The service, and the judgement of what it answers."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self._group: list[tuple[bytes, bytes | str]] = []

    async def start(self) -> None:
        serving = Serving(FrontEndOptions(max_body_bytes=LIMIT, max_in_flight=16))
        self._catalog, self._admission = serving.catalog, serving.admission
        graphs = []
        for name, declared in GRAPHS.items():
            inputs = {
                tensor: {"datatype": datatype, "shape": shape, "optional": optional}
                for tensor, (datatype, shape, optional) in declared.items()
            }
            graphs.append(Graph(name, inputs).to(lambda value: {**value}, "echo").respond())
        await self._catalog.load([graph.compile() for graph in graphs])
        self._service = Service(serving)

    async def stop(self) -> None:
        await self._catalog.stop()

    def _handler(self, name: str) -> Any:
        return self._service.service(SimpleNamespace(method=f"/inference.GRPCInferenceService/{name}"))  # type: ignore[arg-type]

    async def check(self, data: bytes) -> None:
        """Send one request.

        Raises:
            Findings: its answer is wrong.
        """
        answer: bytes | str
        call = Call()
        try:
            async with asyncio.timeout(INPUT_TIMEOUT_S):
                answer = await self._handler("ModelInfer").unary_unary(data, call)
        except TimeoutError:
            raise Findings("no answer") from None
        status = call.code
        if status is not None:
            answer = call.text
        if self._admission.in_flight:
            raise Findings("a slot was not given back")
        verdict, message, want = "valid", None, None
        try:
            message, want = oracle.expected(GRAPHS, data, LIMIT)
        except oracle.Invalid:
            verdict = "invalid"
        except oracle.Unclear:
            verdict = "unclear"
        self.statuses[f"{verdict} {status.name if status else 'OK'}"] += 1
        if status is None:
            if verdict == "invalid":
                raise Findings(f"answered, and is not valid: {answer[:200]!r}")
            if verdict == "valid" and (wrong := oracle.difference(message, want, answer)):
                raise Findings(f"wrong answer: {wrong}")
        elif verdict == "valid":
            raise Findings(f"is valid and was refused: {status} {answer[:300]!r}")
        elif status not in REFUSED and (verdict, status) != ("unclear", grpc.StatusCode.DEADLINE_EXCEEDED):
            raise Findings(f"status {status}: {answer[:300]!r}")
        if verdict != "unclear":
            self._group.append((data, answer))
        if len(self._group) == TOGETHER:
            await self._check_stream()

    async def _check_stream(self) -> None:
        """Send the last requests over one stream: it has to say the same, in this order."""
        group, self._group = self._group, []
        call = Call([data for data, _ in group])
        async with asyncio.timeout(INPUT_TIMEOUT_S):
            await self._handler("ModelStreamInfer").stream_stream(None, call)
        if len(call.written) != len(group):
            raise Findings(f"a stream of {len(group)} requests has {len(call.written)} answers")
        if self._admission.in_flight:
            raise Findings("a stream kept a slot")
        for written, (_, answer) in zip(call.written, group, strict=True):
            item = triton.ModelStreamInferResponse.FromString(written)
            if not item.infer_response.parameters["triton_final_response"].bool_param:
                raise Findings("an item of a stream is not said to be final")
            if isinstance(answer, str):
                same = item.error_message == answer
            else:
                item.infer_response.ClearField("parameters")
                same = not item.error_message and item.infer_response == triton.ModelInferResponse.FromString(answer)
            if not same:
                raise Findings(f"a stream answers {written[:300]!r} where a call gets {answer[:300]!r}")

    async def check_other(self, name: str, data: bytes) -> None:
        """Send bytes to an RPC that changes nothing."""
        handler = self._handler(name)
        try:
            async with asyncio.timeout(INPUT_TIMEOUT_S):
                await handler.unary_unary(data, Call())
        except Aborted as error:
            if error.status not in REFUSED | {grpc.StatusCode.UNAVAILABLE}:
                raise Findings(f"{name}: {error}") from error


def rss_mib() -> float:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


async def run(inputs: int, seed: int) -> str:
    """Fuzz; returns the line of results.

    Raises:
        Findings: with the input.
    """
    rng = random.Random(seed)
    mutator = Mutator(rng, seeds())
    target = Target()
    await target.start()
    begun = time.monotonic()
    slowest = settled = 0.0
    for number in range(inputs):
        data = mutator.next()
        at = time.monotonic()
        try:
            await target.check(data)
            if number % 10 == 0:
                small = triton.ModelMetadataRequest(name=rng.choice(TEXTS), version=rng.choice(TEXTS)).SerializeToString()
                await target.check_other(rng.choice(OTHERS), mutator.mutated(small))
        except Findings as finding:
            raise Findings(f"input {number} of seed {seed}: {finding}\n  {_shown(data)}") from finding
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


def _shown(data: bytes) -> str:
    try:
        return f"{str(triton.ModelInferRequest.FromString(data))[:2000]}\n  {data[:1000]!r}"
    except DecodeError:
        return f"{data[:3000]!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    try:
        print(asyncio.run(run(arguments.inputs, arguments.seed)))
    except Findings as finding:
        print(finding)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
