"""Images that run: non-root, on a read-only root, with this machine's network. Needs root, and what scripts/image.sh makes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

ENVIRONMENT = os.environ | {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}
START_S = 120.0
CHROOT = shutil.which("chroot") or "/usr/sbin/chroot"
"""By its whole path: the image's environment has a PATH of its own."""


def buildah(*arguments: str) -> str:
    done = subprocess.run(["buildah", *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def image_config(image: str) -> dict[str, Any]:
    return json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]


class Running:
    """A container as an engine would run it: the image's own entry point, command, user and environment.

    Attributes:
        root: the container's root folder as this machine sees it.
        started_s: seconds from the start of the process to the first 200 of the ready route.
    """

    def __init__(self, image: str, command: list[str] | None, mounts: dict[Path, str], user: str = "") -> None:
        self.image, self.config = image, image_config(image)
        user = user or self.config["User"]
        self.container = buildah("from", image)
        self.root = Path(buildah("mount", self.container))
        ports = {"--http-port": _free_port(), "--grpc-port": _free_port()}
        self.http, self.grpc = (f"127.0.0.1:{port}" for port in ports.values())
        given = [*self.config["Entrypoint"], *(command or self.config["Cmd"])]
        given += [str(word) for pair in ports.items() for word in pair]
        binds = "".join(f"mount --bind -o ro '{source}' '{self.root}{target}'\n" for source, target in mounts.items())
        variables = " ".join(f"'{variable}'" for variable in self.config["Env"])
        script = (
            f"set -e\nmount --bind '{self.root}' '{self.root}'\n{binds}mount -t proc proc '{self.root}/proc'\n"
            f"mount --rbind /dev '{self.root}/dev'\nmount -o remount,bind,ro '{self.root}'\n"
            f"exec env -i {variables} {CHROOT} --userspec={user} '{self.root}' "
            f'/bin/sh -c \'cd {self.config["WorkingDir"]} && exec "$@"\' sh "$@"\n'
        )
        began = time.monotonic()
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script, "sh", *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            self._wait_until_ready(began + START_S)
        except BaseException:
            self.close()
            raise
        self.started_s = time.monotonic() - began

    def _wait_until_ready(self, end: float) -> None:
        while True:
            with suppress(OSError):
                self.get("/v2/health/ready")
                return
            if self.process.poll() is not None:
                raise AssertionError(f"it ended: {self.process.stdout.read()}")
            assert time.monotonic() < end, "it is not ready"
            time.sleep(0.01)

    def get(self, path: str) -> bytes:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"http://{self.http}{path}", timeout=10
        ) as answer:
            return answer.read()

    def status(self, field: str) -> str:
        """Return a line of the process's /proc/PID/status."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{field}:"))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside the server, in its file system and as its user."""
        environment = dict(variable.split("=", 1) for variable in self.config["Env"])
        inside = [
            "nsenter",
            "--mount",
            f"--target={self.process.pid}",
            "chroot",
            f"--userspec={self.config['User']}",
            str(self.root),
        ]
        return subprocess.run(
            [*inside, "/usr/bin/env", "-i", *(f"{k}={v}" for k, v in environment.items()), *command],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(60)
        self.process.stdout.close()
        buildah("umount", self.container)
        buildah("rm", self.container)


def _free_port() -> int:
    """Return a port that nobody has, and that the system gives to no connection before the server listens."""
    while True:
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", random.randrange(12_000, 32_000)))
            return found.getsockname()[1]
