"""Entry point of `hasten` and of `python -m hasten`."""

import gc
import signal
import sys


def run() -> int:
    """`main` of this process's arguments, after which the process ends.

    Ctrl-C is quiet from the first line to the end of the process, unless whoever started it lets it ignore that.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from hasten.cli.interrupts import interrupts_beside_imports

        with interrupts_beside_imports():
            from hasten.cli.main import main

            return main()
    finally:
        gc.freeze()  # or Python looks for garbage in all of torch before it ends, which takes half a second


if __name__ == "__main__":
    sys.exit(run())
