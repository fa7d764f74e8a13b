"""`python -m minisd`: the command line."""

import sys

from minisd.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
