"""What is measured: how each server is started with a model, and what it needs in $BENCH."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from harness import Launch, Server, free_port

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
BENCH = Path(os.environ.get("BENCH") or Path.home() / ".cache" / "servinggraph-bench").resolve()
MODELS = BENCH / "models"
NAMES = ("iris", "mlp")
SERVINGGRAPH = Path(sys.executable).with_name("servinggraph")


def ours(server: Server) -> Launch:
    """Serve the bare model."""
    return _servinggraph(MODELS / f"{server.model}.onnx", server)


def graph4(server: Server) -> Launch:
    """Serve a graph of the model and three plain Python steps."""
    return _servinggraph(HERE / "graph4" / f"{server.model}.yaml", server)


def floor(server: Server) -> Launch:
    """Serve the bare ASGI function with a batcher, in our own environment."""
    return _uvicorn(server, "batch")


def floor_inline(server: Server) -> Launch:
    """Serve the bare ASGI function with the model on the event loop."""
    return _uvicorn(server, "inline")


def triton(server: Server) -> Launch:
    """Lay out a model repository in the server's folder, and serve it over HTTP only."""
    version = server.folder / "repository" / server.model / "1"
    version.mkdir(parents=True)
    shutil.copy(PEERS / f"triton_{server.model}.pbtxt", version.parent / "config.pbtxt")
    shutil.copy(PEERS / "triton_model.py", version / "model.py")
    shutil.copy(PEERS / "session.py", version)  # the backend looks for modules here only
    home = triton_home()
    command = [
        str(home / "bin" / "tritonserver"),
        f"--model-repository={server.folder / 'repository'}",
        f"--backend-directory={home / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={server.port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
    ]
    environment = {
        "LD_LIBRARY_PATH": f"{home / 'external_libs'}:{home / 'lib'}",
        "PATH": f"{BENCH / 'triton' / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(BENCH / "triton"),
        "PYTHONPATH": str(home.parent.parent),
        "MODELS": str(MODELS),
    }
    return Launch(command, environment)


def triton_home() -> Path:
    """Return the folder of the server that the nvidia-pytriton wheel brings; one that is not there if it is not installed."""
    pattern = "triton/lib/python3*/site-packages/pytriton/tritonserver"
    return next(BENCH.glob(pattern), BENCH / "triton")


def mlserver(server: Server) -> Launch:
    """Write MLServer's settings to the server's folder; the model runs in its own process."""
    settings = {
        "host": "127.0.0.1",
        "http_port": server.port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "parallel_workers": 0,
        "debug": False,
        "logging_settings": {"version": 1, "root": {"level": "WARNING"}},
    }
    model = {"name": server.model, "implementation": "mlserver_runtime.Onnx"}
    (server.folder / "settings.json").write_text(json.dumps(settings))
    (server.folder / "model-settings.json").write_text(json.dumps(model))
    command = [str(BENCH / "mlserver" / "bin" / "mlserver"), "start", str(server.folder)]
    return Launch(command, {"PYTHONPATH": str(PEERS), "MODELS": str(MODELS)})


KINDS: dict[str, Callable[[Server], Launch]] = {
    "ours": ours,
    "graph4": graph4,
    "floor": floor,
    "floor-inline": floor_inline,
    "triton": triton,
    "mlserver": mlserver,
}
"""Name in the results to what launches the server."""


def prepared(kind: str, model: str) -> Server:
    """Return a server that is not started, with an empty folder under $BENCH/run."""
    folder = BENCH / "run" / kind / model
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Server(kind, model, request_body(model), folder)


def request_body(model: str) -> Path:
    """Return the file with a V2 request of one row."""
    return BENCH / f"{model}.json"


def set_up(kinds: Iterable[str]) -> dict[str, str]:
    """Make what is missing for these servers; return those that cannot be made, with the reason.

    Raises:
        SystemExit: without wrk, or without the models, nothing can be measured.
    """
    is_there: dict[str, Callable[[], bool]] = {
        "wrk": lambda: shutil.which("wrk") is not None,
        "models": lambda: all((MODELS / f"{name}.onnx").is_file() and request_body(name).is_file() for name in NAMES),
        "mlserver": (BENCH / "mlserver" / "bin" / "mlserver").is_file,
        "perf_analyzer": lambda: any((BENCH / "perf_analyzer").glob("x/*.data/data/bin/perf_analyzer")),
        "triton": lambda: (triton_home() / "backends/python/triton_python_backend_stub").is_file(),  # noqa: PLW0108  (after setup)
    }
    failed = {}
    for part in ("wrk", "models", *(kind for kind in kinds if kind in is_there)):
        if is_there[part]():
            continue
        environment = os.environ | {"BENCH": str(BENCH), "PYTHON": sys.executable}
        done = subprocess.run([str(HERE / "setup.sh"), part], env=environment, check=False)
        if done.returncode or not is_there[part]():
            failed[part] = f"`setup.sh {part}` failed"
    if missing := failed.keys() - KINDS.keys():
        raise SystemExit(f"nothing can be measured without {' and '.join(sorted(missing))}")
    return failed


def _servinggraph(path: Path, server: Server) -> Launch:
    command = [
        str(SERVINGGRAPH),
        "serve",
        str(path),
        "--http-port",
        str(server.port),
        "--grpc-port",
        "off",
        "--log-level",
        "warning",
    ]
    return Launch(command, {"MODELS": str(MODELS)})


def _uvicorn(server: Server, mode: str) -> Launch:
    command = [sys.executable, "-m", "uvicorn", "floor:app", "--app-dir", str(PEERS), "--port", str(server.port)]
    environment = {"MODE": mode, "MODEL": server.model, "MODELS": str(MODELS)}
    return Launch([*command, "--no-access-log", "--log-level", "warning"], environment)
