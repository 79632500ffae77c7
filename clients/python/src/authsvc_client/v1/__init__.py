"""Generated from protos/authsvc/v1 by `make stubs`."""
