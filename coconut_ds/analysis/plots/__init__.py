"""Pictures, a module for each command that draws. The only importer of matplotlib."""
