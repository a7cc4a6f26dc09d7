"""What llama.cpp's architectures do to a model's tensors that the file itself does not say."""

ROPE_ON_NEIGHBOURS = frozenset(
    {
        "arcee",
        "deci",
        "granite",
        "granitehybrid",
        "granitemoe",
        "llama",
        "mistral",
        "mistral3",
        "olmo",
        "smollm3",
    }
)
"""Architectures whose rope turns neighbouring values of a head, where transformers turns values half a head apart: the
rows of attn_q and attn_k are stored in the order that makes the two the same."""

PERMUTED = ("attn_q", "attn_k")
"""What is stored in that other order; a LoRA there would have to be turned too, and is not."""
