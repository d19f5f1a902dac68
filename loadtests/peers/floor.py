"""The floor: one ASGI function with orjson and ONNX Runtime, and no checks at all.

What the protocol and the model cost in Python; a server's own cost is its distance from here.
MODE=batch: a small batcher in front of one thread. MODE=inline: the model on the event loop.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import orjson
from session import open_session

MAX_ROWS = 64
NAME = os.environ["MODEL"]
DATATYPES = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}

session = open_session(NAME)
input_name = session.get_inputs()[0].name
outputs = [(output.name, DATATYPES[output.type]) for output in session.get_outputs()]


class Batcher:
    """Runs what waits as one batch, in a thread; a request that finds the thread idle goes at once."""

    def __init__(self):
        self.waiting = []
        self.thread = ThreadPoolExecutor(1)
        self.pump = None

    def submit(self, rows):
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((rows, answer))
        if self.pump is None:
            self.pump = asyncio.create_task(self.run())
        return answer

    async def run(self):
        loop = asyncio.get_running_loop()
        while self.waiting:
            batch, self.waiting = self.waiting[:MAX_ROWS], self.waiting[MAX_ROWS:]
            try:
                results = await loop.run_in_executor(self.thread, run_model, [rows for rows, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    answer.set_exception(error)
                continue
            start = 0
            for rows, answer in batch:
                end = start + len(rows)
                if not answer.done():
                    answer.set_result([result[start:end] for result in results])
                start = end
        self.pump = None


def run_model(batch):
    rows = batch[0] if len(batch) == 1 else np.concatenate(batch)
    return session.run(None, {input_name: rows})


async def run_inline(rows):
    return session.run(None, {input_name: rows})


infer = run_inline if os.environ["MODE"] == "inline" else Batcher().submit


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    message = await receive()
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    request = orjson.loads(body)
    tensor = request["inputs"][0]
    results = await infer(np.array(tensor["data"], dtype=np.float32).reshape(tensor["shape"]))
    answer = orjson.dumps(
        {
            "model_name": NAME,
            "id": request.get("id", ""),
            "outputs": [
                {"name": name, "shape": result.shape, "datatype": datatype, "data": result.ravel()}
                for (name, datatype), result in zip(outputs, results, strict=True)
            ],
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
