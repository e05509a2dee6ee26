"""`python -m realtime_serve` is `realtime-serve`."""

import sys

from realtime_serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
