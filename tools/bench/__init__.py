"""What agentd is measured with: programs that drive the daemon. Those that run an algorithm itself lie in paper/."""
