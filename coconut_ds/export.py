"""`python -m coconut_ds.export`, whose code is in commands/."""

import sys

from coconut_ds.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
