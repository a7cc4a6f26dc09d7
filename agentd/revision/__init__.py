"""What a revision is on disk: its files, the chain it stands in, and the archive it travels in."""
