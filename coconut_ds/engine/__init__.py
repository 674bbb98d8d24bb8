"""DeepSpeed: its configuration, its engine, and what a stage switch does to it."""
