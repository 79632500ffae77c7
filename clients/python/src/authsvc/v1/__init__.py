"""Re-exports the option that generated code of users imports (`authsvc.v1.annotations_pb2`)."""
