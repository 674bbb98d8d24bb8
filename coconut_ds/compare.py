"""`python -m coconut_ds.compare`, whose code is in commands/."""

import sys

from coconut_ds.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
