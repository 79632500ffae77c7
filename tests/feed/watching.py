"""What a worker tells its watchers, decoded."""

from collections.abc import AsyncGenerator
from typing import Any

from authsvc.clock import Clock
from authsvc.feed.follow import Follow
from authsvc.feed.watch import WatchChanges
from authsvc.rpc.convert import watched
from authsvc.store.port import FeedStore
from authsvc_client.core.state import State
from authsvc_client.v1 import auth_pb2


def watching(store: FeedStore, follow: Follow, state: State, clock: Clock) -> WatchChanges:
    """As the server makes it."""
    return WatchChanges(store, follow, state, clock, watched)


async def until_beat(
    stream: AsyncGenerator[bytes, None], beats: list[Any] | None = None
) -> list[auth_pb2.WatchChangesResponse]:
    """What comes before the next heartbeat, which goes to `beats`."""
    told: list[auth_pb2.WatchChangesResponse] = []
    while True:
        event = auth_pb2.WatchChangesResponse.FromString(await anext(stream))
        if event.HasField("heartbeat"):
            if beats is not None:
                beats.append(event)
            return told
        told.append(event)
