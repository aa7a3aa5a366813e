"""`python -m hasten` is the command `hasten`."""

import sys

from hasten.cli.main import main

sys.exit(main())
