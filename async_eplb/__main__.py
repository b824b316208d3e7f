"""``python -m async_eplb``."""

import sys

from async_eplb.cli import main

if __name__ == "__main__":
    sys.exit(main())
