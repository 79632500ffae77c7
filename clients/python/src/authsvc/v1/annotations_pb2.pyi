from authsvc_client.v1.annotations_pb2 import *  # noqa: F403
