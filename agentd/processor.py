"""What this machine's processor is good at."""

from pathlib import Path

_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # processors that multiply in bfloat16 at twice the speed, or more


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for matrices of bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return any(flag in flags for flag in _BF16)
