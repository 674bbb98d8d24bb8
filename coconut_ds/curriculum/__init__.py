"""Examples, stages and batches: everything between a JSON file and the model."""
