"""The second engine: torch serves a model of transformers, and the weights themselves learn. docs/transformers.md."""
