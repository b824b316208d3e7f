"""Milliseconds on the event loop's clock."""

import anyio


class Stopwatch:
    """Measures milliseconds on the event loop's clock.

    :param ahead_ms: time to begin with
    """

    def __init__(self, ahead_ms: float = 0.0) -> None:
        self._start = anyio.current_time() - ahead_ms / 1e3

    def ms(self) -> float:
        """Return the time since construction plus ``ahead_ms``."""
        return (anyio.current_time() - self._start) * 1e3
