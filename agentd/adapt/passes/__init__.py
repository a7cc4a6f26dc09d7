"""A pass of each engine, and the parts that passes share."""
