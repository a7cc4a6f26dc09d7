"""agentd: a local language model that learns from the feedback it gets, on the device that serves it."""

__version__ = "0.1.0"
