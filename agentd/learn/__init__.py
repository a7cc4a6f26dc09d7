"""The algorithms, pure: no files but the ledger's, no clock, no model. An optimiser sees a model as a loss oracle.

`philox` needs numpy and is used where directions become arrays; the rest is the standard library.
"""
