"""SIGTERM and SIGINT: a run that is told to stop saves and ends."""

import os
import select as io_select
import signal
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 20.0  # seconds that a chunk of updates may take to end after a signal


class StopSignal:
    """Notes SIGTERM and SIGINT in `asked`, so that a run stops after its current chunk. A second one ends the program at once.

    Python handles a signal only between two chunks, so a thread watches too: where the chunk, or compiling, lasts more than GRACE
    seconds longer, it calls `give_up` (which says what is saved) and ends the program with code 0.
    """

    def __init__(self, give_up: Callable[[], None] | None = None):
        self.asked, self.give_up = False, give_up
        self._noticed = threading.Event()
        receive, send = os.pipe()
        os.set_blocking(send, False)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(send, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(receive,), daemon=True).start()

    def notice(self) -> bool:
        """Whether to stop; if so, the run has all the time it needs from now on."""
        if self.asked:
            self._noticed.set()
        return self.asked

    def _watch(self, receive: int) -> None:
        while os.read(receive, 1)[0] not in SIGNALS:  # others may have handlers of their own
            pass
        self.asked = True
        again, _, _ = io_select.select([receive], [], [], GRACE)
        if not again and self.give_up and not self._noticed.is_set():
            self.give_up()
            os._exit(0)
        os.read(receive, 1)
        os._exit(1)
