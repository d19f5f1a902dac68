"""`servinggraph serve`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servinggraph.cli.logs import configure_logging
from servinggraph.errors import GraphInvalid, ServingGraphError

if TYPE_CHECKING:
    from servinggraph.plan import Plan
    from servinggraph.server import Server

__all__ = ["serve"]

_SHOWN = {"grpc": "gRPC", "kafka": "Kafka"}


def _server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one option for each field of `ServerOptions`, so that a setting is written once."""
    from servinggraph.server import ServerOptions

    for name, field in reversed(ServerOptions.model_fields.items()):
        kind: Any = field.annotation if field.annotation in (int, float) else str
        if field.annotation is bool:
            command = click.option(f"--{name.replace('_', '-')}", name, is_flag=True, default=None, help=field.description)(
                command
            )
            continue
        many = field.annotation == list[str]
        shown = None if many or field.default == "" else field.default
        command = click.option(
            f"--{name.replace('_', '-')}", name, type=kind, default=None, multiple=many,
            help=f"{field.description}" + (f"  [default: {shown}]" if shown is not None else ""),
        )(command)  # fmt: skip
    return command


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the graph file.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True)
@_server_options
def serve(path: Path, overrides: tuple[str, ...], log_level: str, **settings: Any) -> None:
    """Serve a graph file, a folder of them, or a bare .onnx model."""
    with _ended_by_sigterm():
        _serve(path, overrides, log_level, settings)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """End the process on SIGTERM until the server takes signals itself.

    As the first process of a container it would not hear it at all: for that one the kernel ignores a
    signal that nobody has asked for, and to compile large models takes a while.
    """

    def end(*_: Any) -> None:
        logging.getLogger("servinggraph.server").info("stopped while loading")
        logging.shutdown()
        os._exit(0)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread, where there are no signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _serve(path: Path, overrides: tuple[str, ...], log_level: str, settings: dict[str, Any]) -> None:
    import asyncio

    from pydantic import ValidationError

    from servinggraph.server import CannotServe, Server, ServerOptions, new_event_loop, read_graphs

    started = time.perf_counter()
    json_logs = settings["log_format"] == "json"
    configure_logging(log_level, "json" if json_logs else "text")
    given = {name: _as_option(name, value) for name, value in settings.items() if value not in (None, ())}
    try:
        options = ServerOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise click.UsageError(f"--{flag} {first['input']}: {first['msg'].replace('Input should be', 'expected')}") from None
    try:
        folder = path if path.is_dir() else None
        plans = [] if folder is not None else read_graphs(path, overrides)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            announce = _announcement(path, started, json_logs=json_logs)
            runner.run(_run(lambda: Server(plans, options, announce, folder, overrides)))
    except GraphInvalid as error:
        _fail(str(error), f"{len(error.problems)} problem{'s' if len(error.problems) != 1 else ''}: not served")
    except (CannotServe, ServingGraphError) as error:
        _fail(str(error))


async def _run(make: Callable[[], Server]) -> None:
    await make().run()  # a server is made on its event loop


def _announcement(path: Path, started: float, *, json_logs: bool) -> Callable[[Server], None]:
    def announce(server: Server) -> None:
        seconds = time.perf_counter() - started
        if json_logs:
            ports = {name: getattr(front_end, "port", "topics") for name, front_end in server.front_ends.items()}
            graphs = [f"{plan.name}/{plan.version}" for plan in server.plans]
            logging.getLogger("servinggraph").info("serving %s on %s, ready in %.2f s", graphs, ports, seconds)
        else:
            with contextlib.suppress(OSError):  # nobody reads it, or the disk is full: no reason not to serve
                click.echo(_banner(server, path, seconds))
                sys.stdout.flush()

    return announce


def _banner(server: Server, path: Path, seconds: float) -> str:
    lines = [""]
    for plan in server.plans:
        lines.append(f"  {plan.name}  version {plan.version}" + (f"  ({plan.source})" if plan.source else f"  ({path})"))
        for node in plan.every_node():
            depth = node.name.count(".")
            lines.append(f"    {'  ' * depth}{node.name.rpartition('.')[2]:<{16 - 2 * depth}} {node.work.describe()}")
    if server.options.model_control != "none":
        lines.append(f"  {path}: model control {server.options.model_control}, {len(server.plans)} versions loaded")
    lines.append("")
    everywhere = ("0.0.0.0", "::")  # noqa: S104  (compared with, not listened on)
    host = "127.0.0.1" if server.options.host in everywhere else server.options.host
    for name, front_end in server.front_ends.items():
        if name == "kafka":
            lines += [f"  Kafka at {line}" for line in front_end.describe()]
            continue
        address = f"{server.options.host}:{front_end.port}"
        lines.append(f"  HTTP on http://{address}" if name == "http" else f"  {_SHOWN.get(name, name)} on {address}")
    if server.development_broker is not None:
        lines.append(f"  Kafka for development only, in memory, on {server.development_broker}")
    lines.append(f"  ready in {seconds:.2f} s; stop with Ctrl-C")
    tries = []
    if "http" in server.front_ends and server.plans:
        tries.append(_curl(server.plans[0], host, server.front_ends["http"].port))
    if server.development_broker is not None:
        tries += _over_kafka(server.plans, server.development_broker)
    if tries:
        lines += ["", "  Try it:", "", *(f"  {line}" for line in tries), ""]
    return "\n".join(lines)


def _over_kafka(plans: Sequence[Plan], brokers: str) -> list[str]:
    """Return lines that send a request to the first graph that reads topics, and show its answer."""
    plan = next((plan for plan in plans if plan.kafka is not None), None)
    if plan is None or plan.kafka is None:
        return []
    data = _body_data(plan)[0] if plan.body else _data(plan) or "@request.json"
    lines = [f"servinggraph kafka send {plan.kafka.input.topics[0]} {shlex.quote(data)} --brokers {brokers}"]
    if plan.kafka.output.topic:
        lines.append(f"servinggraph kafka read {plan.kafka.output.topic} --from-start --brokers {brokers}")
    return lines


def _curl(plan: Plan, host: str, port: int) -> str:
    """Return a curl line that works: with the sample beside the graph, else with zeros for small inputs."""
    url = f"http://{host}:{port}/v2/models/{plan.name}"
    if plan.body:
        return _curl_body(plan, f"{url}/invocations")
    data = _data(plan)
    return f"curl -s {url}" if data is None else f"curl -s {url}/infer -d {shlex.quote(data)}"


def _data(plan: Plan) -> str | None:
    """Return a request as curl takes it: the sample beside the graph, else zeros; None where these would be many."""
    sample = Path(plan.source).parent / "sample.json" if plan.source else None
    if sample is not None and sample.is_file():
        return f"@{sample}"
    inputs = []
    for name, spec in plan.inputs.items():
        shape = [1 if size == -1 else size for size in spec.shape or ()]
        count = 1
        for size in shape:
            count *= size
        if count > 64:
            return None
        filler: Any = {"BYTES": "text", "BOOL": False}.get(spec.datatype or "", 0)
        if not spec.optional:
            inputs.append({"name": name, "datatype": spec.datatype, "shape": shape, "data": [filler] * count})
    return json.dumps({"inputs": inputs})


def _curl_body(plan: Plan, url: str) -> str:
    data, media = _body_data(plan)
    option = "--data-binary" if data.startswith("@") else "-d"
    return f"curl -s {url} -H 'Content-Type: {media}' {option} {shlex.quote(data)}"


def _body_data(plan: Plan) -> tuple[str, str]:
    """Return a body for a graph with `inputs: body`, and its type: the sample beside it, else text or an object."""
    for suffix, media in ((".json", "application/json"), (".txt", "text/plain")):
        sample = Path(plan.source).parent / f"sample{suffix}" if plan.source else None
        if sample is not None and sample.is_file():
            return f"@{sample}", media
    keys = dict.fromkeys(plan.body_keys or (), "...")
    return (json.dumps(keys) if keys else '"..."'), "application/json"


def _as_option(name: str, value: Any) -> Any:
    if name.endswith("_port"):
        return int(value) if value.isdigit() else value
    return list(value) if isinstance(value, tuple) else value


def _fail(*lines: str) -> None:
    for line in lines:
        click.echo(line, err=True)
    sys.exit(1)
