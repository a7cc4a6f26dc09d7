"""Shapes of current model families, for tools/shape_model.py."""
