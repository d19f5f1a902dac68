"""What is written without servinggraph: a loop that only copies, and one that calls a server over HTTP for each message.

usage: kafka_loops.py copy|http BROKERS INPUT OUTPUT [URL]
"""

import asyncio
import sys

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer


async def main(kind: str, brokers: str, source: str, target: str, url: str = "") -> None:
    consumer = AIOKafkaConsumer(
        source, bootstrap_servers=brokers, group_id=source, auto_offset_reset="earliest", enable_auto_commit=False
    )
    producer = AIOKafkaProducer(bootstrap_servers=brokers, acks="all", enable_idempotence=True, linger_ms=5)
    await consumer.start()
    await producer.start()
    answer = await http(url) if kind == "http" else None
    while True:
        read = await consumer.getmany(timeout_ms=500, max_records=500)
        records = [record for part in read.values() for record in part]
        bodies = [record.value for record in records] if answer is None else await asyncio.gather(*map(answer, records))
        sent = [
            await producer.send(target, body, key=record.key, headers=list(record.headers))
            for record, body in zip(records, bodies, strict=True)
        ]
        await asyncio.gather(*sent)
        if records:
            await consumer.commit()


async def http(url):
    """Return what answers a record by a call, at most 64 of them at once."""
    import aiohttp

    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64))
    headers = {"Content-Type": "application/json"}

    async def call(record):
        async with session.post(url, data=record.value, headers=headers) as reply:
            assert reply.status == 200
            return await reply.read()

    return call


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(main(*sys.argv[1:]))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main(*sys.argv[1:]))
