"""The engine as a process of its own: its runner, the daemon's client, the wire between them, and its supervisor."""
