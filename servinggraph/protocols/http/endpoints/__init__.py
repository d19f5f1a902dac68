"""What is reached over HTTP beside inference: one module for each part of the protocol, each with `routes(serving)`."""
