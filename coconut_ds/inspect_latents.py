"""`python -m coconut_ds.inspect_latents`, whose code is in commands/."""

import sys

from coconut_ds.commands.inspect_latents import main

if __name__ == "__main__":
    sys.exit(main())
