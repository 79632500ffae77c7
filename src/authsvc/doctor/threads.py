"""Work that may hang, such as on a network filesystem, in threads that nobody waits for."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any


async def in_thread(work: Callable[..., None], *arguments: Any) -> None:
    """Ends with the work; cancelled, it leaves the work behind, which ends with the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if not done.done():
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

    def run() -> None:
        failed: BaseException | None = None
        try:
            work(*arguments)
        except BaseException as error:
            failed = error
        with suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(tell, failed)

    threading.Thread(target=run, daemon=True).start()
    await done
