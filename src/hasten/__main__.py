"""Entry point of `hasten` and of `python -m hasten`."""

import gc
import sys

from hasten.cli.interrupts import interrupts_beside_imports


def run() -> int:
    """`main` of this process's arguments, after which the process ends."""
    try:
        with interrupts_beside_imports():
            from hasten.cli.main import main

            return main()
    finally:
        gc.freeze()  # or Python looks for garbage in all of torch before it ends, which takes half a second


if __name__ == "__main__":
    sys.exit(run())
