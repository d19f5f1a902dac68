"""Requests from Kafka topics, answers to topics. docs/kafka.md has the promises, each with its test.

`server` is the front end, with a `stream` for each graph that has a `kafka:` block; a stream keeps a
`session` with the brokers alive. Of a session, `consumption` reads and pauses, `work` runs records through
the graph by way of `exchange` and `codec`, and `delivery` writes what came of them and commits. `lanes`,
`offsets` and `budget` decide and do no I/O; only `clients` makes clients of aiokafka.
"""
