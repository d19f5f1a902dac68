"""Writes made-up card transactions to the topic, as a payment system would: `produce.py --brokers 127.0.0.1:9092`."""

import argparse
import asyncio
import itertools
import json
import os

from aiokafka import AIOKafkaProducer
from transactions import transactions


async def main(brokers, topic, count, rate, poison_every, seed):
    async with AIOKafkaProducer(bootstrap_servers=brokers, acks="all", linger_ms=5) as producer:
        began = asyncio.get_running_loop().time()
        for number, (document, fraud) in enumerate(itertools.islice(transactions(seed), count), 1):
            if poison_every and number % poison_every == 0:
                del document["amount"]  # nobody can decide on this one
            if rate:
                await asyncio.sleep(began + number / rate - asyncio.get_running_loop().time())
            await producer.send(
                topic,
                json.dumps(document).encode(),
                key=document["card"].encode(),
                # Headers come back with the decision: so whoever watches knows the truth, which the models do not see.
                headers=[
                    ("content-type", b"application/json"),
                    ("x-request-id", document["id"].encode()),
                    ("truth", b"fraud" if fraud else b"fine"),
                ],
            )
            if number % 1000 == 0:
                print(f"{number} transactions written to {topic}", flush=True)
    print(f"{count} transactions written to {topic}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brokers", default=os.environ.get("KAFKA", "127.0.0.1:9092"))
    parser.add_argument("--topic", default="transactions")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=200, help="a second; 0 for as fast as it goes")
    parser.add_argument("--poison-every", type=int, default=0, help="each so-and-so-manieth transaction is broken")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    asyncio.run(main(**vars(options)))
