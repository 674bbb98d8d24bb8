"""`python -m coconut_ds.export`, an older name of `python -m coconut_ds export`."""

from coconut_ds.commands.export import main

if __name__ == "__main__":
    raise SystemExit(main(prog="python -m coconut_ds.export"))
