"""`python -m coconut_ds.sweep FILE`, an older name of `python -m coconut_ds sweep --list FILE`."""

import sys

from coconut_ds.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main(["--list", *sys.argv[1:]], prog="python -m coconut_ds.sweep"))
