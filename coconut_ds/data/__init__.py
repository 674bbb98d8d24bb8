"""How does a record become a batch? Records, stages, tokens, batches, loaders, answers."""
