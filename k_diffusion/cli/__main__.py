"""`python -m k_diffusion.cli` is `k-diffusion`."""

import sys

from .app import main

if __name__ == "__main__":
    sys.exit(main())
