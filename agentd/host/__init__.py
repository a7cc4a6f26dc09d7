"""The machine: memory, control groups, processor, clock, and the service manager."""
