"""The whole loop on real input, as a user's agent would go through it: `python -m tools.demo`."""
