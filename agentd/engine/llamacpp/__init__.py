"""llama.cpp behind the Engine protocol, through llama-cpp-python's low-level API."""
