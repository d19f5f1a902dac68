"""The server: graphs from a path, front ends on ports, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from servinggraph.compiler import compile_source
from servinggraph.errors import GraphInvalid, Problem
from servinggraph.importing import ImportProblem
from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import Serving
from servinggraph.plan import Plan
from servinggraph.registry import kinds, load_kind
from servinggraph.spec import GraphSpec, Source, read_file
from servinggraph.version import __version__

__all__ = ["CannotServe", "Server", "ServerOptions", "new_event_loop", "read_graphs"]

logger = logging.getLogger("servinggraph.server")

GRAPH_FILES = (".yaml", ".yml")


class CannotServe(Exception):
    """The server cannot start; the text is one sentence for the person at the terminal."""


class ServerOptions(FrontEndOptions):
    """Settings of a server process. Each field is an option of `servinggraph serve`."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    http_port: int | Literal["off"] = Field(8080, description="Port for HTTP; 0 takes a free one, off for none.")
    grpc_port: int | Literal["off"] = Field("off", description="Port for gRPC, where a gRPC front end is installed.")
    grace_s: float = Field(30, ge=0, description="On SIGTERM, seconds that requests in flight have to finish.")
    shutdown_delay_s: float = Field(
        0, ge=0, description="On SIGTERM, seconds to go on accepting while not ready, so that load balancers notice."
    )


def read_graphs(path: Path, overrides: Sequence[str] = (), replace: Any = None) -> list[Plan]:
    """Compile what `serve` and `check` are given: a graph file, a folder of them, or a bare model.

    Raises:
        GraphInvalid: with the problems of every file.
    """
    if path.is_dir():
        return _read_folder(path, overrides)
    if path.suffix == ".onnx":
        return [_bare_model(path, overrides)]
    if not path.exists():
        raise GraphInvalid([Problem(f"there is no file or folder '{path}'")])
    return [compile_source(read_file(path, overrides), replace)]


def _read_folder(path: Path, overrides: Sequence[str]) -> list[Plan]:
    files = sorted(p for p in path.iterdir() if p.suffix in GRAPH_FILES and p.is_file())
    files += sorted(p / "graph.yaml" for p in path.iterdir() if (p / "graph.yaml").is_file())
    # Models beside graph files are those that the graphs name; alone they are what is to be served.
    files = files or sorted(p for p in path.iterdir() if p.suffix == ".onnx" and p.is_file())
    if not files:
        raise GraphInvalid([Problem(f"folder '{path}' holds no graph: expected *.yaml, */graph.yaml or *.onnx")])
    plans: list[Plan] = []
    problems: list[Problem] = []
    for file in files:
        try:
            plans.extend(read_graphs(file, overrides))
        except GraphInvalid as error:
            problems.extend(error.problems)
    seen: dict[tuple[str, str], Plan] = {}
    for plan in plans:
        other = seen.setdefault((plan.name, plan.version), plan)
        if other is not plan:
            text = f"graph '{plan.name}' version {plan.version} is in {other.source}, too"
            problems.append(Problem(text, file=plan.source))
    if problems:
        raise GraphInvalid(problems)
    return plans


def _bare_model(path: Path, overrides: Sequence[str]) -> Plan:
    """Return a graph of nothing but one model, named as its file; `--set` reaches its node as `model`."""
    if not path.is_file():
        raise GraphInvalid([Problem(f"there is no file '{path}'")])
    from servinggraph.spec.source import read_text

    base = path.resolve().parent
    text = f"graph: {path.stem}\ninputs: {{}}\nnodes:\n  model: {{step: onnx, path: {path.name!r}}}\nanswer: model\n"
    source = read_text(text, None, base, overrides)
    spec = GraphSpec.model_validate(source.document)
    # The graph's inputs are the model's: made a first time to learn them.
    signature = _model_signature(spec, source)
    inputs = {
        name: {"datatype": tensor.datatype, "shape": list(tensor.shape or ()), "optional": tensor.optional}
        for name, tensor in signature.items()
    }
    source.document["inputs"] = inputs
    return compile_source(source)


def _model_signature(spec: GraphSpec, source: Source) -> dict[str, Any]:
    from servinggraph.compiler.nodes import NodeCompiler

    problems: list[Problem] = []
    node = NodeCompiler(source, {}, problems, spec.sequences is not None).node(
        "model", spec.nodes["model"], ("nodes", "model"), (), None
    )
    if node is None:
        raise GraphInvalid(problems)
    return dict(node.signature.inputs or {})


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop of the fastest kind that is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _cannot_listen(host: str, port: object, protocol: str, error: OSError) -> CannotServe:
    reason = error.strerror or error
    return CannotServe(f"cannot listen on {host} port {port} ({protocol}): {reason}; choose another with --{protocol}-port")


def _spare_the_collector() -> None:
    """Keep the garbage collector away from what lives as long as the process, and from most requests.

    A request leaves no cycles behind; with Python's default of one collection for every 700
    new containers a server under load runs one about every tenth request, which was measured
    as 5 % of the work of a request (iris, 32 at once, 34.3 against 32.4 us without sockets).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


class Server:
    """One server process.

    Args:
        plans: what to serve.
        options: settings.
        announce: called once with the running server, when it is ready.
    """

    def __init__(self, plans: Sequence[Plan], options: ServerOptions, announce: Callable[[Server], None]) -> None:
        self.plans = plans
        if not options.server_version:
            options = options.model_copy(update={"server_version": __version__})
        self.options = options
        self.serving = Serving(options)
        self.front_ends: dict[str, Any] = {}
        self._announce = announce
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until told to stop.

        Raises:
            CannotServe: a port in use, a front end that is not installed.
            ServingGraphError: a graph failed to load.
        """
        options = self.options
        for protocol in ("http", "grpc"):
            port = getattr(options, f"{protocol}_port")
            if port == "off":
                continue
            if protocol not in kinds("protocols"):
                have = ", ".join(kinds("protocols"))
                raise CannotServe(f"--{protocol}-port {port}: no {protocol} front end is installed; there is {have}")
            try:
                front_end = load_kind("protocols", protocol)(self.serving, options.host, port)
            except ImportProblem as error:
                raise CannotServe(f"--{protocol}-port {port}: {error}") from None
            try:
                front_end.bind()
            except OSError as error:
                raise _cannot_listen(options.host, port, protocol, error) from None
            self.front_ends[protocol] = front_end
        if not self.front_ends:
            raise CannotServe("every front end is off: there would be no way to reach a graph")
        grace_s = options.grace_s
        with self._signals():
            try:
                await self._load()
                _spare_the_collector()
                for protocol, front_end in self.front_ends.items():
                    try:
                        await front_end.start()
                    except OSError as error:  # another process was quicker to listen
                        raise _cannot_listen(options.host, front_end.port, protocol, error) from None
                self._announce(self)
                await self._stop.wait()
                logger.info("stopping: not ready any more, %d requests in flight", self.serving.admission.in_flight)
                self.serving.catalog.draining = True
                # Sequences under way may end, by requests that have yet to come; both share the grace time.
                last = asyncio.get_running_loop().time() + options.shutdown_delay_s + options.grace_s
                ended = asyncio.ensure_future(self.serving.catalog.end_sequences())
                await asyncio.sleep(options.shutdown_delay_s)
                await asyncio.wait([ended], timeout=options.grace_s)
                ended.cancel()
                grace_s = max(0.0, last - asyncio.get_running_loop().time())
            finally:
                await asyncio.gather(*(front_end.stop(grace_s) for front_end in self.front_ends.values()))
                with contextlib.suppress(TimeoutError):
                    # A run on a device that never ends must not keep the process alive.
                    await asyncio.wait_for(self.serving.catalog.stop(), options.grace_s + 1)
        logger.info("stopped")

    async def _load(self) -> None:
        """Load the graphs; a signal meanwhile ends the process at once."""
        loading = asyncio.ensure_future(self.serving.catalog.load(self.plans))
        told = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({loading, told}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            told.cancel()
            await loading
            return
        logger.info("stopped while loading")
        logging.shutdown()
        # Nothing is served yet, and a load runs in a thread, which nothing can interrupt: an orderly
        # end would wait for it, and the supervisor's patience may be shorter.
        os._exit(0)

    def stop(self) -> None:
        """Begin an orderly end."""
        self._stop.set()

    @contextlib.contextmanager
    def _signals(self) -> Any:
        loop = asyncio.get_running_loop()
        names = (signal.SIGINT, signal.SIGTERM)
        try:
            for name in names:
                loop.add_signal_handler(name, self.stop)
        except (NotImplementedError, RuntimeError):  # Windows, or not the main thread
            names = ()  # type: ignore[assignment]
        try:
            yield
        finally:
            for name in names:
                loop.remove_signal_handler(name)
