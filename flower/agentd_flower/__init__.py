"""Boards that run agentd learn together, on Flower."""
