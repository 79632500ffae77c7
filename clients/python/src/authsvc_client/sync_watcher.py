"""As `watcher`, for threads."""

import contextlib
import logging
import threading
from typing import Any

import grpc

from . import watcher
from .core.watched import OutOfStep, Watched
from .watcher import Reconnecting

_log = logging.getLogger("authsvc_client")
_OVER = object()


class SyncWatcher:
    """As Watcher, in a daemon thread."""

    def __init__(self, stub: Any, watched: Watched, lock: threading.Lock, **times: Any) -> None:
        """`lock` is held while the state changes."""
        self._stub, self._lock = stub, lock
        self._reconnecting = Reconnecting(watched, **times)
        self._confirmed, self._stopped = threading.Event(), threading.Event()
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name="authsvc-watch", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def confirmed(self, timeout_s: float) -> bool:
        """Waits for the first confirmation; False where it did not come."""
        return self._confirmed.wait(timeout_s)

    def stop(self) -> None:
        """Ends the stream and the thread."""
        self._stopped.set()
        if self._call is not None:
            self._call.cancel()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            error: BaseException | None = None
            try:
                self._watch()
            except (grpc.RpcError, OutOfStep) as ended:
                error = ended
            except Exception as fault:
                _log.exception("a fault while changes were watched")
                error = fault
            self._stopped.wait(self._reconnecting.ended(error))

    def _watch(self) -> None:
        call = self._call = self._stub.WatchChanges(self._reconnecting.request())
        silence = _Silence(call)
        try:
            if self._stopped.is_set():  # before it could be seen by stop()
                return
            for response in call:
                silence.broken()
                self._take(response)
                if response.HasField("heartbeat"):
                    self._confirmed.set()
        finally:
            silence.end()
            call.cancel()

    def _take(self, response: Any) -> None:
        steps, is_over = self._reconnecting.take(response), False
        while not is_over:
            with self._lock:
                is_over = next(steps, _OVER) is _OVER


class _Silence:
    """Cancels a blocking stream that says nothing: a thread cannot wait for it with a timeout."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._heard, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._listen, name="authsvc-silence", daemon=True)
        self._thread.start()

    def broken(self) -> None:
        """Something was said."""
        self._heard.set()

    def end(self) -> None:
        """The stream is over."""
        self._over = True
        self._heard.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._over:
            if not self._heard.wait(watcher.SILENT_S_MAX):
                with contextlib.suppress(Exception):
                    self._call.cancel()
                return
            self._heard.clear()
