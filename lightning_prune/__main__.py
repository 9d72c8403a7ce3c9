"""``python -m lightning_prune``: the command line."""

import sys

from lightning_prune.cli import main

if __name__ == "__main__":
    sys.exit(main())
