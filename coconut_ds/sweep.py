"""`python -m coconut_ds.sweep`, whose code is in commands/."""

import sys

from coconut_ds.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main())
