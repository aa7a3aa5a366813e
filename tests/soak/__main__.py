"""`python -m tests.soak NAME [options]`: one soak; exits with 1 if it did not pass. Without a name, lists them."""

import sys
from importlib import import_module

NAMES = (
    *("malformed", "departures", "engine_death", "termination", "slow_readers", "mixed_load", "logprob_load"),
    "reload",
)


def main(arguments: list[str]) -> int:
    """Run the soak that the first argument names."""
    if not arguments or arguments[0] not in NAMES:
        sys.stderr.write(f"usage: python -m tests.soak {{{','.join(NAMES)}}} [options]\n")
        return 2
    status: int = import_module(f"tests.soak.{arguments[0]}").main(arguments[1:])
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
