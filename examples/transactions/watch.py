"""Shows decisions as they come: how many a second, how long they took, and how often they are right."""

import argparse
import asyncio
import json
import os
import time
from collections import Counter

from aiokafka import AIOKafkaConsumer


async def main(brokers, topic, count, from_start):
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=brokers, auto_offset_reset="earliest" if from_start else "latest")
    await consumer.start()
    seen, shown, began = Counter(), time.monotonic(), time.monotonic()
    try:
        while not count or seen.total() < count:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                for record in records:
                    truth = dict(record.headers).get("truth", b"").decode()
                    seen[json.loads(record.value)["decision"], truth] += 1
            if time.monotonic() - shown >= 1:
                shown = time.monotonic()
                print(line(seen, shown - began), flush=True)
    finally:
        await consumer.stop()
    print(line(seen, time.monotonic() - began))


def line(seen, seconds):
    fraud = sum(number for (_, truth), number in seen.items() if truth == "fraud")
    caught = sum(number for (decision, truth), number in seen.items() if truth == "fraud" and decision != "approve")
    decisions = Counter()
    for (decision, _), number in seen.items():
        decisions[decision] += number
    parts = [f"{seen.total()} decisions, {seen.total() / seconds:.0f} a second"]
    parts += [f"{name} {decisions[name]}" for name in ("approve", "review", "decline")]
    return ", ".join([*parts, f"{caught} of {fraud} frauds caught"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brokers", default=os.environ.get("KAFKA", "127.0.0.1:9092"))
    parser.add_argument("--topic", default="decisions")
    parser.add_argument("--count", type=int, default=0, help="end after so many")
    parser.add_argument("--from-start", action="store_true", help="also those that are there already")
    options = parser.parse_args()
    asyncio.run(main(**vars(options)))
