"""Readers and writers of file formats that others define. Standard library where a header is enough."""
