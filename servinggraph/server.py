"""The server: graphs from a path, front ends on ports, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from servinggraph.errors import Unavailable
from servinggraph.importing import ImportProblem
from servinggraph.interfaces import FrontEndOptions
from servinggraph.lifecycle import RepositorySettings, Serving, read_graphs
from servinggraph.plan import Plan
from servinggraph.registry import load_kind
from servinggraph.version import __version__

__all__ = ["CannotServe", "Server", "ServerOptions", "new_event_loop", "read_graphs"]

logger = logging.getLogger("servinggraph.server")


GRPC_PORT: Final = 8081

_Port = Annotated[int, Field(ge=0, le=65535)]


class CannotServe(Exception):
    """The server cannot start; the text is one sentence for the person at the terminal."""


class ServerOptions(FrontEndOptions):
    """Settings of a server process. Each field is an option of `servinggraph serve`."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    http_port: _Port | Literal["off"] = Field(8080, description="Port for HTTP; 0 takes a free one, off for none.")
    grpc_port: _Port | Literal["off"] | None = Field(
        None,
        description="Port for gRPC; 0 takes a free one, off for none. By default 8081 where the extra `grpc` is installed.",
    )
    kafka: Literal["auto", "off"] = Field(
        "auto", description="Whether topics are read for graphs with a `kafka:` block; `http-port` and `grpc-port` may be off."
    )
    kafka_brokers: str = Field("", description="Addresses of Kafka brokers, instead of those in the graphs.")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Port for /metrics alone, 0 takes a free one; by default it is on the HTTP port."
    )
    grace_s: float = Field(30, ge=0, description="On SIGTERM, seconds that requests in flight have to finish.")
    model_control: Literal["none", "poll", "explicit"] = Field(
        "none",
        description="For a folder: none loads all at start, poll follows changes on disk, explicit loads and unloads what it "
        "is asked for over HTTP or gRPC; whoever may ask can run code.",
    )
    repository_poll_s: float = Field(15, gt=0, description="With poll, seconds between two looks at the folder.")
    load_model: list[str] = Field(
        default_factory=list, description="With explicit, a graph to load at start; may be given more than once, `*` for all."
    )
    max_loaded: int = Field(
        0, ge=0, description="For a folder: most versions in memory; the least recently used makes room. 0 for no limit."
    )
    memory_budget: int = Field(
        0,
        ge=0,
        description="For a folder: most bytes that graphs may take, each by the size of its files or the growth of the process "
        "while it was loaded, whichever is more (an estimate). 0 for no limit.",
    )
    kafka_dev: bool = Field(
        False,
        description="For development only: run a Kafka broker inside this process, in memory, and use it instead of those that "
        "graph files name; needs the extra `kafka-dev`.",
    )
    shutdown_delay_s: float = Field(
        0, ge=0, description="On SIGTERM, seconds to go on accepting while not ready, so that load balancers notice."
    )


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


@contextlib.contextmanager
def _development_broker() -> Iterator[str]:
    """Run a Kafka broker in this process; give its address.

    Raises:
        CannotServe: what it needs is not installed, or it did not start.
    """
    from servinggraph.kafka.development import development_broker

    with contextlib.ExitStack() as until_the_end:
        try:
            address = until_the_end.enter_context(development_broker())
        except ImportError as error:
            raise CannotServe(f"--kafka-dev: {error}: pip install 'servinggraph[kafka-dev]'") from None
        except Unavailable as error:
            raise CannotServe(f"--kafka-dev: {error}") from None
        yield address


def _spare_the_collector() -> None:
    """Keep the garbage collector away from what lives as long as the process, and from most requests.

    A request leaves no cycles behind; with Python's default of one collection for every 700
    new containers a server under load runs one about every tenth request, which was measured
    as 5 % of the work of a request (iris, 32 at once, 34.3 against 32.4 us without sockets).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def _repository_settings(options: ServerOptions, folder: Path | None, overrides: Sequence[str]) -> RepositorySettings:
    """Return how the repository is kept.

    Raises:
        CannotServe: an option is for another kind of repository.
    """
    control = options.model_control
    given = {
        "model-control": control != "none",
        "load-model": bool(options.load_model),
        "max-loaded": options.max_loaded > 0,
        "memory-budget": options.memory_budget > 0,
    }
    for name, is_given in given.items():
        if is_given and folder is None:
            raise CannotServe(f"--{name} is for a folder of graphs, and what is to be served is none")
    if options.load_model and control != "explicit":
        raise CannotServe(f"--load-model goes with --model-control explicit, and not with {control}, which loads all")
    return RepositorySettings(
        folder=folder,
        mode=control,
        poll_s=options.repository_poll_s,
        load=options.load_model,
        overrides=overrides,
        max_loaded=options.max_loaded,
        memory_budget=options.memory_budget,
        max_file_bytes=options.max_body_bytes,
    )


class Server:
    """One server process.

    Args:
        plans: what to serve; the repository's graphs join them.
        options: settings.
        announce: called once with the running server, when it is ready.
        folder: the model repository's folder.
        overrides: `--set` texts, for every graph file of the folder.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        options: ServerOptions,
        announce: Callable[[Server], None],
        folder: Path | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        self.plans = list(plans)
        if not options.server_version:
            options = options.model_copy(update={"server_version": __version__})
        self.options = options
        self.serving = Serving(options, _repository_settings(options, folder, overrides))
        self.front_ends: dict[str, Any] = {}
        self.development_broker: str | None = None
        self._announce = announce
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until told to stop.

        Raises:
            CannotServe: a port in use, a front end that is not installed.
            ServingGraphError: a graph failed to load.
        """
        with contextlib.ExitStack() as until_the_end:
            if self.options.kafka_dev:
                self.development_broker = until_the_end.enter_context(_development_broker())
            await self._run()

    async def _run(self) -> None:
        options = self.options
        try:
            self._bind()
        except BaseException:
            await asyncio.gather(*(front_end.stop(0) for front_end in self.front_ends.values()))
            raise
        if not self.front_ends.keys() - {"metrics"}:
            raise CannotServe("every front end is off: there would be no way to reach a graph")
        grace_s = options.grace_s
        with self._signals():
            try:
                if options.model_control == "none":
                    await self._load()
                    _spare_the_collector()
                else:  # graphs come and go, and what they leave behind has to be collected
                    _spare_the_collector()
                    await self._load()
                self.plans = [graph.plan for graph in self.serving.catalog.graphs()]
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
                    await asyncio.wait_for(self.serving.repository.stop(), options.grace_s + 1)
                await self.serving.close()
        logger.info("stopped")

    def _bind(self) -> None:
        options = self.options
        ports: dict[str, int | str | None] = {"http": options.http_port, "grpc": options.grpc_port}
        if options.metrics_port is not None and options.metrics == "on":
            ports["metrics"] = options.metrics_port
        for protocol, port in ports.items():
            front_end = self._front_end(protocol, port)
            if front_end is None:
                continue
            try:
                front_end.bind()
            except OSError as error:
                raise _cannot_listen(self.options.host, front_end.port, protocol, error) from None
            self.front_ends[protocol] = front_end
        kafka = self._kafka()
        if kafka is not None:
            self.front_ends["kafka"] = kafka

    def _kafka(self) -> Any:
        """Return the Kafka front end; None where it is off, or no graph can ask for it."""
        asked = any(plan.kafka is not None for plan in self.plans)
        if self.options.kafka == "off" or not (asked or self.serving.repository.settings.folder is not None):
            return None
        try:
            return load_kind("protocols", "kafka")(self.serving, self.development_broker or self.options.kafka_brokers)
        except ImportProblem as error:
            if asked:
                raise CannotServe(f"a graph has a 'kafka:' block: {error}") from None
            return None

    def _front_end(self, protocol: str, port: int | str | None) -> Any:
        """Return a front end, None where it is off, or not installed and nobody asked for it."""
        if port == "off":
            return None
        try:
            return load_kind("protocols", protocol)(self.serving, self.options.host, GRPC_PORT if port is None else port)
        except ImportProblem as error:
            if port is None:
                logger.info("no %s front end: %s", protocol, error)
                return None
            raise CannotServe(f"--{protocol}-port {port}: {error}") from None

    async def _load(self) -> None:
        """Load the graphs; a signal meanwhile ends the process at once."""
        loading = asyncio.ensure_future(self._load_graphs())
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

    async def _load_graphs(self) -> None:
        if self.plans:
            await self.serving.catalog.load(self.plans)
        await self.serving.repository.start()

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
