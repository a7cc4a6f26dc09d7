"""Demonstration, benchmarks and helpers around agentd. Not installed with it."""
