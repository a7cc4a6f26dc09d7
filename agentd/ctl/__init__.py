"""agentctl, the admin tool. It speaks HTTP over the admin socket and shares no code with the daemon but its paths."""
