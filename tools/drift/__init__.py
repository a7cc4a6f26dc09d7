"""A camera is turned, and its classifier learns to see again: `make demo-drift`."""
