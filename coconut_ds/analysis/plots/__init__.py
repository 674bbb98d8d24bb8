"""Plots, one module per command that draws. The only importer of matplotlib."""
