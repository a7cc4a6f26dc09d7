"""Measurements of the papers' algorithms themselves, outside a daemon."""
