"""What learning would cost in memory, what there is, and which plan fits. Imports neither torch nor llama.cpp."""
