"""`python -m coconut_ds.export`, an older name of `python -m coconut_ds export`."""

import sys

from coconut_ds.commands.export import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m coconut_ds.export"))
