"""`python -m coconut_ds.ask`, whose code is in commands/."""

import sys

from coconut_ds.commands.ask import main

if __name__ == "__main__":
    sys.exit(main())
