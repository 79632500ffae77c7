"""As `validator`, for threads."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from . import clock
from .core.judge import Verdict
from .core.step_up import NO_STEP_UP, StepUp
from .core.watched import Watched
from .messages import RemoteVerdict
from .staleness import CLOSED, WhenStale
from .sync_client import SyncAuthsvcClient
from .sync_watcher import SyncWatcher
from .validator import STALENESS_S, Counts, Local, question_of


class SyncLocalValidator:
    """As LocalValidator, for any number of threads; it watches in one of its own."""

    def __init__(
        self,
        client: SyncAuthsvcClient,
        *,
        issuer: str,
        staleness_max_s: float = STALENESS_S,
        when_stale: WhenStale = CLOSED,
        now: Callable[[], float] = clock.boot,
    ) -> None:
        """The parameters are those of LocalValidator. Make it after the last fork."""
        self._client = client
        self._local = Local(issuer, staleness_max_s=staleness_max_s, when_stale=when_stale, now=now)
        self._lock = threading.Lock()
        """Caches, counts, and a clock that never goes back are not made for threads."""
        self._watcher = SyncWatcher(client.stub, Watched(self._local.state), self._lock, now=now)

    @property
    def counts(self) -> Counts:
        """How tokens were judged."""
        return self._local.counts

    @property
    def revision(self) -> int:
        """Of the last change that was applied."""
        return self._local.state.revision

    def age_s(self) -> float:
        """Seconds since the state was confirmed; infinite before the first time."""
        return self._local.age_s()

    def start(self) -> None:
        """Begins to watch."""
        self._watcher.start()

    def ready(self, timeout_s: float = 10.0) -> None:
        """Waits until tokens can be judged; TimeoutError where that takes too long."""
        if not self._watcher.confirmed(timeout_s):
            raise TimeoutError("no confirmed state in time")

    def validate(
        self,
        token: str,
        *,
        audience: str,
        scopes: frozenset[str] = frozenset(),
        thumbprint: str = "",
        require_bound: bool = False,
        permissions: frozenset[str] = frozenset(),
        step_up: StepUp = NO_STEP_UP,
        when_stale: WhenStale | None = None,
    ) -> Verdict | RemoteVerdict:
        """As LocalValidator's."""
        local = self._local
        question = question_of(audience, scopes, thumbprint, require_bound, step_up, permissions)
        with self._lock:
            verdict = local.judge(token, question, when_stale)
            if verdict is not None:
                return verdict
            revision = local.asks()
        try:
            found = self._client.validate(
                token,
                audience=audience,
                scopes=scopes,
                thumbprint=thumbprint,
                require_bound=require_bound,
                permissions=permissions,
                step_up=step_up,
                at_least=revision,
            )
        finally:
            with self._lock:
                local.asking -= 1
        with self._lock:
            return found.but(local.told(token, found.reason))

    def close(self) -> None:
        """Ends the stream and the thread."""
        self._watcher.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.close()
