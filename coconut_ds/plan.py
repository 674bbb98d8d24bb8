"""`python -m coconut_ds.plan`, an older name of `python -m coconut_ds plan`."""

from coconut_ds.commands.plan import main

if __name__ == "__main__":
    raise SystemExit(main(prog="python -m coconut_ds.plan"))
