"""The training process: backpropagation in a range of blocks, on inputs that the engine tapped.

`python -m agentd.trainer SPEC.json` trains LoRA matrices for one pass and ends; nothing else of agentd imports torch.
"""

UNSUPPORTED = 3
"""The exit status for a model whose blocks cannot be built here."""
