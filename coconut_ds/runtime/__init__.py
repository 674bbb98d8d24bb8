"""How do processes work together? Ranks, signals, the watchdog. No model in here."""
