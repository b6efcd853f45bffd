"""`python -m torchord.coordinator` is the command `torchord`."""

from __future__ import annotations

import sys

from torchord.coordinator.cli import main

if __name__ == "__main__":
    sys.exit(main())
