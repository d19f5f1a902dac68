"""Messages of the service, made from `../proto/*.proto` by `make proto`; only `_pool.py` is written by hand."""
