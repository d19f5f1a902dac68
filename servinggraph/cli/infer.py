"""`servinggraph infer`: one request to a running server, from the terminal."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from http.client import HTTPException
from pathlib import Path

import click

from servinggraph.cli.params import SECONDS, headers_from

__all__ = ["infer"]


@click.command()
@click.argument("url")
@click.argument("model")
@click.option(
    "-i",
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=VALUE",
    help="A tensor: JSON, or @FILE (.npy, .npz, .json, a picture, text). The name may be left out where there is one input.",
)
@click.option("--body", metavar="VALUE", help="For a graph that takes bodies: JSON, or @FILE.")
@click.option("--content-type", help="With --body, its content type; by default JSON, or what the file's name says.")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    metavar="NAME[=@FILE]",
    help="An output to ask for, or to write to a .npy file; by default all are printed.",
)
@click.option("--model-version", default="", help="By default the server's choice.")
@click.option("--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="A parameter of the request.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="A header (gRPC: metadata).")
@click.option("--id", "request_id", default="", help="Id of the request.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--timeout-s", type=SECONDS, default=30, show_default=True)
def infer(
    url: str,
    model: str,
    inputs: tuple[str, ...],
    body: str | None,
    content_type: str | None,
    outputs: tuple[str, ...],
    model_version: str,
    parameters: tuple[str, ...],
    headers: tuple[str, ...],
    request_id: str,
    as_json: bool,
    timeout_s: float,
) -> None:
    """Ask MODEL on the server at URL (http://host:port or grpc://host:port) once, and print the answer.

    Values are converted to the datatypes that the server says the model takes; whole numbers that would change are refused.
    """
    import orjson

    from servinggraph.cli.asking.body import ask_with_body
    from servinggraph.cli.asking.target import Target, failure
    from servinggraph.cli.asking.values import key_values, shown, tensors_from

    named = {text.partition("=")[0]: text.partition("=")[2] for text in outputs}
    sent_headers = headers_from(headers)
    target = Target(url, timeout_s)
    if body is not None:
        if inputs or target.is_grpc:
            raise click.UsageError("--body goes over HTTP and without --input")
        try:
            status, text = ask_with_body(target.url, model, model_version, body, content_type, sent_headers, timeout_s)
        except (OSError, HTTPException) as error:
            _fail(f"{target.url}: {error}")
        click.echo(text)
        sys.exit(0 if status < 400 else 1)
    with closing(target):
        try:
            takes, _ = target.metadata(model, model_version, sent_headers)
            if not takes:
                raise click.UsageError(f"model '{model}' takes no tensors: give it a --body")
            tensors = tensors_from(inputs, takes)
            began = time.perf_counter()
            reply = target.infer(
                model, model_version, tensors, outputs=list(named), id=request_id,
                parameters=key_values(parameters, "--parameter"), headers=sent_headers,
            )  # fmt: skip
            took = time.perf_counter() - began
        except click.UsageError:
            raise
        except Exception as error:
            _fail(f"{url} {model}: {failure(error)}")
    if as_json:
        document = {"model": model, "version": reply.model_version, "id": reply.id, "parameters": dict(reply.parameters)}
        click.echo(orjson.dumps({**document, "outputs": shown(reply.outputs), "ms": round(took * 1e3, 3)}))
    else:
        click.echo(f"{model} version {reply.model_version}, {took * 1e3:.1f} ms")
        _print(reply.outputs, reply.parameters)
    _write(named, reply.outputs, told=as_json)


def _write(named: dict[str, str], outputs: object, *, told: bool) -> None:
    """Write outputs to files, and say so: on the error stream where the other is for a program."""
    import numpy as np

    assert isinstance(outputs, dict)
    for name, place in named.items():
        if not place:
            continue
        path = Path(place.removeprefix("@"))
        if name not in outputs:
            _fail(f"the answer has no output '{name}' to write to {path}")
        if outputs[name].dtype == object:
            _fail(f"output '{name}' is BYTES, which a .npy file cannot hold: nothing was written to {path}; --json prints it")
        try:
            with path.open("wb") as file:  # np.save would give the file a name of its own
                np.save(file, outputs[name], allow_pickle=False)
        except OSError as error:
            _fail(f"cannot write {path}: {error.strerror}")
        click.echo(f"wrote {path}", err=told)


def _print(outputs: object, parameters: object) -> None:
    import numpy as np

    from servinggraph.tensors import datatype_of

    assert isinstance(outputs, dict)
    assert isinstance(parameters, dict)
    for name, array in outputs.items():
        readable = array
        if array.dtype == object:
            texts = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in array.reshape(-1)]
            readable = np.array(texts).reshape(array.shape)
        text = np.array2string(readable, threshold=64, precision=6, separator=", ")
        click.echo(f"{name} {datatype_of(array)} {list(array.shape)}\n{text}")
    if parameters:
        click.echo("parameters: " + ", ".join(f"{name}={value}" for name, value in parameters.items()))


def _fail(text: str) -> None:
    click.echo(text, err=True)
    sys.exit(1)
