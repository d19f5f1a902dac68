"""The conditions of a run: the machine, and the versions of all that ran on it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from servers import BENCH, HERE

_VERSIONS = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def machine() -> dict[str, str]:
    """Return what the machine is, label to text."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory_kb = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "cores": f"{len(os.sched_getaffinity(0))}, load generator included",
        "CPU": cpu[1] if cpu else platform.machine(),
        "memory": f"{int(memory_kb[1]) / 2**20:.0f} GiB" if memory_kb else "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "wrk": _wrk_version(),
    }


def versions(kind: str, triton: str = "") -> str:
    """Return the versions of a server's environment in one line.

    Args:
        kind: a name of `servers.KINDS`.
        triton: the running Triton's own word on its version.
    """
    common = ["onnxruntime", "numpy"]
    if kind == "triton":
        return f"tritonserver {triton}, {packages(BENCH / 'triton/bin/python', 'nvidia-pytriton', *common)}"
    if kind == "mlserver":
        return packages(BENCH / "mlserver/bin/python", "mlserver", *common, "uvicorn", "uvloop")
    own = packages(Path(sys.executable), *common, "uvicorn", "uvloop", "httptools", "orjson")
    return own if kind.startswith("floor") else f"{servinggraph()}, {own}"


def servinggraph() -> str:
    """Return our version, and the revision it is at."""
    found = packages(Path(sys.executable), "servinggraph").rpartition(", ")[2]
    revision = _output("git", "-C", str(HERE), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(HERE.parent), "status", "--porcelain", "--", "servinggraph")
    return f"{found} (git {revision or 'unknown'}{' with changes' if changed else ''})"


def packages(python: Path, *names: str) -> str:
    found = json.loads(_output(str(python), "-c", _VERSIONS, *names) or "{}")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _wrk_version() -> str:
    # It prints its version with its usage, and then complains.
    found = re.search(r"wrk (\S+)", _output("wrk", "-v"))
    return found[1] if found else "unknown"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
