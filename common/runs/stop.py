"""Signals, and a closed terminal: a run that is told to stop saves and ends."""

import contextlib
import os
import select as io_select
import signal
import socket
import sys
import threading
from collections.abc import Callable

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))  # Windows lacks one
GRACE = 20.0  # seconds that a chunk of updates may take to end after a signal


class StopSignal:
    """Within it, `asked` notes SIGTERM, SIGINT, SIGHUP, and that nobody reads what is printed, so that a run stops after the chunk
    that it is in. A second signal ends the program at once. Afterwards signals mean what they meant before.

    Python handles a signal only between two chunks, so a thread watches too: where the chunk, or compiling, lasts more than GRACE
    seconds longer, it calls `give_up` (which says what is saved) and ends the program with code 0. Outside of a program's main
    thread no signal can be noted.
    """

    def __init__(self, give_up: Callable[[], None] | None = None):
        self.asked, self.give_up = False, give_up
        self._noticed = threading.Event()

    def __enter__(self) -> "StopSignal":
        self._stdout, sys.stdout = sys.stdout, Heard(sys.stdout, self._unheard)
        self._before, self._thread = {}, None
        if threading.current_thread() is not threading.main_thread():
            return self
        self._receive, self._send = socket.socketpair()  # not a pipe: Windows wakes up by sockets alone
        self._send.setblocking(False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
                self._before[number] = signal.signal(number, lambda number, frame: None)
        self._wakeup = signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        sys.stdout = self._stdout
        if not self._thread:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._send.close()  # which ends the thread
        self._thread.join()
        self._receive.close()

    def notice(self) -> bool:
        """Whether to stop; if so, the run has all the time it needs from now on."""
        if self.asked:
            self._noticed.set()
        return self.asked

    def _unheard(self) -> None:
        """Nobody reads what is printed (`| head`, a closed terminal): stops, and prints to nowhere from now on."""
        self.asked = True
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stdout.fileno())
            os.close(nowhere)

    def _watch(self) -> None:
        while True:
            data = self._receive.recv(1)
            if not data:
                return
            if data[0] in SIGNALS:  # others may have handlers of their own
                break
        self.asked = True
        again, _, _ = io_select.select([self._receive], [], [], GRACE)
        if not again and self.give_up and not self._noticed.is_set():
            self.give_up()
            os._exit(0)
        while data := self._receive.recv(1):
            if data[0] in SIGNALS:
                os._exit(1)


class Heard:
    """A stream that calls `unheard` instead of failing where nobody reads it any more."""

    def __init__(self, stream, unheard: Callable[[], None]):
        self._stream, self._unheard = stream, unheard

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:  # EPIPE of a pipe, EIO of a terminal that was closed
            self._unheard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._unheard()
