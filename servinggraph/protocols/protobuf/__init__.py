"""V2 inference as protobuf messages, without I/O; over gRPC, and in the records of a Kafka topic.

`codec` turns messages into requests and back, `contents` does so for typed tensors, `wire` takes
bytes apart where tensors are. `generated` is made by `make proto` from `proto/`.
"""
