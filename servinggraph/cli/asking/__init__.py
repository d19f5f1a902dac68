"""What commands that ask a running server share: its address, the tensors of its models, values from the command line."""
