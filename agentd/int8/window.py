"""The geometry of convolutions, and how long a sum of products may be. Standard library only."""

from dataclasses import dataclass

MAX_TERMS = 1 << 16
"""The most products in a sum: 2**16 * 127**2 < 2**30, which leaves int32 room for a bias and for rounding."""


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution: a k x k kernel at this stride over an input padded with zeros."""

    kernel: int
    stride: int
    padding: int

    def output(self, height: int, width: int) -> tuple[int, int]:
        reach = 2 * self.padding - self.kernel
        return (height + reach) // self.stride + 1, (width + reach) // self.stride + 1
