"""The gRPC front end: service `inference.GRPCInferenceService`, wire-identical with Triton's.

The contract and the messages are in `protocols/protobuf/`. `infer` and `stream` answer inference,
`endpoints/` everything else, one module for each part; `service` puts them together and `server`
opens the port.
"""
