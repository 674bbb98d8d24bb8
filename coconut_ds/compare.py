"""`python -m coconut_ds.compare`, an older name of `python -m coconut_ds compare`."""

from coconut_ds.commands.compare import main

if __name__ == "__main__":
    raise SystemExit(main(prog="python -m coconut_ds.compare"))
