"""HTTP over UNIX sockets: serving, feedback, administration."""
