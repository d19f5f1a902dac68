"""The gRPC front end: service `inference.GRPCInferenceService`, wire-identical with Triton's.

`proto/` holds the contract, `generated/` what `make proto` makes of it. `codec` turns messages into
requests and back, `infer` and `stream` answer inference, `endpoints/` everything else, one module for
each part; `service` puts them together and `server` opens the port.
"""
