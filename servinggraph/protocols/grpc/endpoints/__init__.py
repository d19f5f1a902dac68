"""What is reached over gRPC beside inference: one module for each part of the protocol, each with `methods(serving)`."""
