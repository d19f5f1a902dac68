"""Plays users who send scans and correct what was read: `.venv/bin/python examples/bandit/simulate.py`."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path

import numpy as np

from servinggraph import Graph

HERE = Path(__file__).parent
REQUESTS = 2000
STRETCH = 250
LATE = 20  # requests that pass before a user has looked at the answer
ANSWERS = 0.8  # share of the users who say what the digit was


def main() -> None:
    """Send the requests, give feedback late, and print who answered."""
    with np.load(HERE.parent / "digits" / "holdout.npz") as held_out:
        images, labels = held_out["images"], held_out["labels"]
    chance = np.random.default_rng(1)
    with Graph.load(HERE / "graph.yaml").mock() as server:
        names = list(server.router("read").settings()["enabled"])
        print(f"{'requests':>12}", *(f"{name:>14}" for name in names))
        chosen: Counter[str] = Counter()
        waiting: deque[tuple[str, int]] = deque()
        for number in range(REQUESTS):
            scan = int(chance.integers(len(images)))
            answer = server.infer(image=images[scan : scan + 1], id=f"scan-{number}")
            chosen[str(answer.parameters["read.variant"])] += 1
            if chance.random() < ANSWERS:
                waiting.append((f"scan-{number}", scan))
            if len(waiting) > LATE:
                request, seen = waiting.popleft()
                server.feedback(request, truth={"label": [int(labels[seen])]})
            if (number + 1) % STRETCH == 0:
                stretch = f"{number + 2 - STRETCH}-{number + 1}"
                print(f"{stretch:>12}", *(f"{chosen[name] / STRETCH:>14.0%}" for name in names))
                chosen.clear()
        report = server.router("read").report()
    print()
    for name in names:
        rewards = report["rewards"][name]
        print(
            f"{name:>14}: {report['decisions'][name]:>5} requests, {rewards['count']:>5} corrected, {rewards['mean']:.1%} right"
        )
    print(
        f"best: {report['best']}; lost by looking for it: {report['regret']:.0f} of {sum(report['decisions'].values())} scans"
    )


if __name__ == "__main__":
    main()
