"""LoRA (Hu et al. 2021, equation 3): h = W x + alpha / r B A x with W frozen, A (r, in) random and B (out, r) zero.

By BP it is `Backpropagation` on `names(model)`, by zeroth-order steps `InPlace` on them: MeZO (LoRA) of Malladi et al.
2023. With `freeze_a` only B moves (LoRA-FA, Zhang et al. 2023): then the update is linear in what is trained, which
zeroth-order steps like, as perturbing A says nothing while B is zero.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update beside it, in fp32 whatever the layer's type is."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator, freeze_a: bool) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        a = torch.randn(rank, base.in_features, generator=generator) / base.in_features**0.5
        device = base.weight.device
        if freeze_a:
            self.register_buffer("lora_a", a.to(device))
        else:
            self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = linear(linear(x.to(self.lora_b.dtype), self.lora_a), self.lora_b)
        y: Tensor = self.base(x)
        return y + (self.scale * low).to(y.dtype)


def attach(
    model: nn.Module,
    rank: int,
    alpha: float,
    seed: int,
    *,
    targets: Callable[[str], bool] = lambda name: not name.endswith("lm_head"),
    freeze_a: bool = False,
) -> list[LoRALinear]:
    """Puts LoRA on every linear layer whose name `targets` accepts, all but the head by default.

    A comes from the seed and the layer's name. Raises ValueError when there is no such layer.
    """
    layers = []
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and targets(name):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            layers.append(LoRALinear(module, rank, alpha, generator, freeze_a).train(model.training))
            put(model, name, layers[-1])
    if not layers:
        raise ValueError("the model has no linear layer to put LoRA on")
    return layers


def detach(model: nn.Module) -> None:
    """Takes all LoRA off again; the base layers are as they were."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            put(model, name, module.base)


def names(model: nn.Module) -> frozenset[str]:
    """The parameters that LoRA trains."""
    return frozenset(name for name, _ in model.named_parameters() if name.rpartition(".")[2] in ("lora_a", "lora_b"))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
