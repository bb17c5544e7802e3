"""Stopping a long run by a signal, at a place from which it can go on."""

import signal
import sys


class StopOnSignal:
    """Within it, the first interrupt or termination only asks to stop after the current batch."""

    asked = False

    def __enter__(self) -> "StopOnSignal":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this batch; interrupt again to stop at once", file=sys.stderr)
