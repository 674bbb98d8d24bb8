"""`python -m coconut_ds.inspect_latents`, an older name of `python -m coconut_ds inspect`."""

from coconut_ds.commands.inspect_latents import main

if __name__ == "__main__":
    raise SystemExit(main(prog="python -m coconut_ds.inspect_latents"))
