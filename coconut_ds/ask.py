"""`python -m coconut_ds.ask`, an older name of `python -m coconut_ds ask`."""

import sys

from coconut_ds.commands.ask import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m coconut_ds.ask"))
