"""`python -m genrec` is the `genrec` command."""

from __future__ import annotations

import sys

from genrec.cli import main

if __name__ == "__main__":
    sys.exit(main())
