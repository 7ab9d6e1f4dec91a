"""`python -m vislora`."""

import sys

from vislora.cli import main

if __name__ == "__main__":
    sys.exit(main())
