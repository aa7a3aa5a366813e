"""An event loop in a thread of its own, beside tests that block."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class LoopThread:
    """An event loop in a thread. `close` cancels what still runs in it, so that nothing is left for a later test."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self.loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        self.loop.run_forever()
        self._runner.close()  # here: the thread that calls `close` may have a running loop of its own

    def run(self, work: Coroutine[Any, Any, Result], timeout: float = 100) -> Result:
        """A coroutine's result."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout)
        finally:
            future.cancel()

    def close(self) -> None:
        """End the loop."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
