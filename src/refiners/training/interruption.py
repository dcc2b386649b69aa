"""Ctrl-C and SIGTERM, which machines send before they stop: heard, and told to whoever asks at a good moment."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A training was stopped by the signal `number`, after a whole step and its checkpoint."""

    def __init__(self, step: int, number: int, folder: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}, which is saved in {folder}; the same command "
            "goes on from there"
        )
        self.number = number


class Interruption:
    """While it is entered, the first SIGINT or SIGTERM is kept in `number`; a second one acts as it did before.

    Signals reach the main thread alone: in any other one, nothing is heard.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._hear) for each in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._let_go()

    def _let_go(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}
