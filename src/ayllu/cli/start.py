"""Where the program `ayllu` begins: a command that will need an engine has its process started first of all.

Both then load at the same time: by when the command line is read and the model found, the engine's process
has most of its own imports behind it, which is a third of the time to the first token.
"""

from __future__ import annotations

import sys

TALKS = "chat"
"""The command that opens a model here."""


def main() -> None:
    """The program `ayllu`."""
    if sys.argv[1:2] != [TALKS] or not {"-h", "--help"}.isdisjoint(sys.argv):
        from ayllu.cli.main import main as run

        run()
        return
    from ayllu.engine.launch import Launched, import_numpy

    launched = Launched()
    try:
        import_numpy()
        from ayllu.cli.main import main as run

        run(launched)
    finally:
        # Where the command did not come to take it: a wrong option, an unknown model.
        launched.discard()
