"""Ctrl-C and SIGTERM as requests that a long job answers when what it is doing is safe."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requests(*, at_once: bool = False) -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM comes; a second one acts as it did before.

    Args:
        at_once: raise ``KeyboardInterrupt`` as well. It may be lost (Python ignores what is raised while objects are
            being deleted), and then the list still tells.
    """
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers}

    def request(number: int, _frame: FrameType | None) -> None:
        requests.append(number)
        signal.signal(number, previous[number])
        if at_once:
            raise KeyboardInterrupt

    for number in previous:
        signal.signal(number, request)
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
