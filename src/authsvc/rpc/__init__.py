"""The gRPC edge: decode, call the verb, encode."""
