"""Clients for what needs more than an HTTP or gRPC library: requests and answers over Kafka topics, dead letters."""
