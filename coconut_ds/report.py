"""`python -m coconut_ds.report`, an older name of `python -m coconut_ds report`."""

from coconut_ds.commands.report import main

if __name__ == "__main__":
    raise SystemExit(main(prog="python -m coconut_ds.report"))
