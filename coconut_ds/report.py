"""`python -m coconut_ds.report`, whose code is in commands/."""

import sys

from coconut_ds.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
