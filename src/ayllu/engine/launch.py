"""Starts an engine's process, and is the first thing that runs in it. Standard library only, little of it.

A program that knows it will need an engine starts its process before it has loaded anything else, so that
both load at the same time.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack

# -P: a torch.py or an ayllu/ in the folder where a person happens to be must not run in place of ours.
WORKER_COMMAND = (sys.executable, "-P", "-c", "from ayllu.engine.launch import run_worker; run_worker()")
"""Starts an engine's process; the number of its socket is put after it."""


class Launched:
    """A process under way, and our end of its channel. Whoever takes it watches it; else `discard` it.

    On Linux it is killed when the thread that made this ends.
    """

    def __init__(self, command: Sequence[str] = WORKER_COMMAND) -> None:
        """Raises OSError when the process cannot be started."""
        self.taken = False
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ExitStack() as on_failure, theirs:
            on_failure.callback(self.socket.close)
            # A program whose standard input is closed gets sockets with the numbers of the standard streams.
            descriptor = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 3)
            # The process inherits this: Ctrl-C must not end it before it has come to ignoring it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self.popen = subprocess.Popen(
                    [*command, str(descriptor)],
                    pass_fds=[descriptor],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                os.close(descriptor)
            on_failure.pop_all()

    def take(self) -> Launched:
        """This, to be watched from now on by whoever called."""
        self.taken = True
        return self

    def discard(self) -> None:
        """End the process and wait for its end, unless it was taken."""
        if self.taken:
            return
        self.socket.close()
        self.popen.kill()
        self.popen.wait()
        if self.popen.stdout is not None:
            self.popen.stdout.close()


def import_numpy() -> None:
    """numpy, without the thread per core and their memory that its OpenBLAS starts with: nothing here has
    numpy multiply matrices. Other libraries, imported later, do not see the setting."""
    name = "OPENBLAS_NUM_THREADS"
    if "numpy" in sys.modules or name in os.environ:
        return
    os.environ[name] = "1"
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[name]


def run_worker() -> None:
    """What the process does: answers over the socket whose number is its argument."""
    import_numpy()
    from ayllu.engine.worker import main

    main(int(sys.argv[1]))
