"""What lets a candidate in: held-out examples, drift, and their statistics."""
