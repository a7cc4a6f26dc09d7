"""Calls of tools: a model's own format for them, read off its chat template, and what follows from it."""
