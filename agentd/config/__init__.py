"""The configuration: its keys, their checks and defaults, paths, and what a reload may change."""
