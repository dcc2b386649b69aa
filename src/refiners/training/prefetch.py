"""Makes the next batch in a second thread while the present one is computed with."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self


class Prefetch:
    """Calls `fetch(index)` for indexes that rise by one, one call ahead of time."""

    def __init__(self, fetch: Callable[[int], Any]) -> None:
        self.fetch = fetch
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Any]] | None = None

    def take(self, index: int) -> Any:
        """What `fetch(index)` gives or raises."""
        future = self._next[1] if self._next and self._next[0] == index else self._executor.submit(self.fetch, index)
        result = future.result()
        self._next = (index + 1, self._executor.submit(self.fetch, index + 1))
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
