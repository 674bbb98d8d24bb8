"""How is DeepSpeed driven? The engine, its states, what a stage switch does to it."""
