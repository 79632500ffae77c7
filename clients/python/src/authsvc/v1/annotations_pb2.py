"""The option (authsvc.v1.require), where generated code looks for it."""

from authsvc_client.v1.annotations_pb2 import *  # noqa: F403
