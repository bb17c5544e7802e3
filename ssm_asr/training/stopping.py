"""Stopping a long run by a signal, at a place from which it can go on."""

import signal
import sys


class StopOnSignal:
    """Within its `with` block, the first SIGINT or SIGTERM only asks to stop, and the second interrupts at once."""

    asked = False

    def __enter__(self) -> "StopOnSignal":
        self._former_handlers = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this batch; interrupt again to stop at once", file=sys.stderr)
