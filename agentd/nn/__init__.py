"""The paper's methods on the weights of a torch module itself: MeZO, ElasticZO, backpropagation and their kin.

Pure algorithms: no I/O, no process, no knowledge of HTTP or SQLite. Whoever imports a module of this package imports
torch; only import_stubs, which says how, waits until it is asked.
"""
