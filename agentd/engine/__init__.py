"""The engine: the process that owns the weights, and what the daemon knows of it."""
