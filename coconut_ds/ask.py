"""`python -m coconut_ds.ask`, an older name of `python -m coconut_ds ask`."""

from coconut_ds.commands.ask import main

if __name__ == "__main__":
    raise SystemExit(main(prog="python -m coconut_ds.ask"))
