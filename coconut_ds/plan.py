"""`python -m coconut_ds.plan`, whose code is in commands/."""

import sys

from coconut_ds.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
