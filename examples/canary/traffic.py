"""Sends requests to the served graph until the rollout has ended, and shows how it goes; can break the new model on the way.

.venv/bin/python examples/canary/traffic.py --break-at 25%
"""

import argparse
import http.client
import json
import random
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

HERE = Path(__file__).parent
BROKEN = HERE / "broken"
ROUTER = "/admin/graphs/rollout/routers/score"


def call(connection, method, path, body=None, headers=None):
    """Return status and parsed JSON of an answer."""
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


class Traffic(threading.Thread):
    """One of several senders.

    Attributes:
        answered: requests that were answered.
        failed: requests that were not.
    """

    def __init__(self, address, images):
        super().__init__(daemon=True)
        self.address, self.images = address, images
        self.answered = self.failed = 0
        self.over = False

    def run(self):
        connection = http.client.HTTPConnection(self.address, timeout=10)
        while not self.over:
            image = random.choice(self.images)
            tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 8, 8], "data": image.tolist()}
            headers = {"x-user": f"user-{random.randrange(100_000)}"}
            status, _ = call(connection, "POST", "/v2/models/rollout/infer", json.dumps({"inputs": [tensor]}), headers)
            self.answered += status == 200
            self.failed += status != 200
        connection.close()


def line(report, senders):
    """Say in one line where the rollout stands."""
    shares = "  ".join(f"{branch} {share:4.0%}" for branch, share in report["shares"].items())
    answered, failed = sum(sender.answered for sender in senders), sum(sender.failed for sender in senders)
    waits = f"   waits for {report['waits_for']}" if report["waits_for"] else ""
    return f"{report['stage']:>11}  {shares}   {answered} answered, {failed} failed{waits}"


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--url", default="http://127.0.0.1:8080")
    options.add_argument("--break-at", metavar="STAGE", help="stage at which the new model breaks, 25% say")
    options.add_argument("--senders", type=int, default=4)
    options.add_argument("--longest", type=float, default=120, metavar="SECONDS")
    given = options.parse_args()

    address = urlsplit(given.url).netloc
    admin = http.client.HTTPConnection(address, timeout=10)
    images = np.load(HERE.parent / "digits" / "holdout.npz")["images"]
    senders = [Traffic(address, images) for _ in range(given.senders)]
    for sender in senders:
        sender.start()
    end = time.monotonic() + given.longest
    try:
        while time.monotonic() < end:
            time.sleep(0.25)
            report = call(admin, "GET", ROUTER)[1]["report"]
            print(line(report, senders), flush=True)
            if report["status"] in ("promoted", "rolled_back"):
                break
            if report["stage"] == given.break_at and not BROKEN.exists():
                print(f"            now the new model breaks: {BROKEN.name} is there", flush=True)
                BROKEN.touch()
    finally:
        BROKEN.unlink(missing_ok=True)
        for sender in senders:
            sender.over = True
    for change in reversed(call(admin, "GET", "/admin/audit?graph=rollout")[1]):
        print(f"\n{change['time']} {change['who']}: {change['before']} -> {change['after']}\n  {change['why']}")


if __name__ == "__main__":
    main()
