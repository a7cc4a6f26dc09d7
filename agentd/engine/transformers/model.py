"""The one module that computes, whose parameters point at whichever weights are wanted: serving's or a candidate's.

Changing them is a pointer per parameter. Background work lets others in before every block, forwards and backwards.
"""

import inspect
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from agentd.engine.transformers.image import Image, Mapped
from agentd.engine.transformers.joint import attention
from agentd.engine.transformers.loading import Loaded
from agentd.limits import PRODUCT_ROWS
from agentd.nn.forward_patch import as_made
from agentd.nn.structure import block_list


class Weights:
    """Weights to compute with: those of an image, or (`private`) a copy of them that learns.

    On the CPU they are mapped from the image's file; on a GPU they are copied there when they are first used, and
    `release` lets the copy go again.
    """

    def __init__(self, image: Image, device: torch.device, *, private: bool = False) -> None:
        self.image, self._device, self.private = image, device, private
        self._mapped: Mapped | None = None
        self._tensors: dict[str, torch.Tensor] | None = None
        self.touched = False

    @property
    def mapped(self) -> Mapped:
        if self._mapped is None:
            copied = self.private and self._device.type == "cpu"
            self._mapped = self.image.open(mmap.ACCESS_COPY if copied else mmap.ACCESS_READ)
        return self._mapped

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        self.touched = True
        if self._tensors is None:
            self._tensors = {name: tensor.to(self._device) for name, tensor in self.mapped.tensors.items()}
        return self._tensors

    def release(self) -> None:
        """Gives memory back that can be had again from the file. A copy that has learned cannot."""
        if self.touched and not self.private:
            self.touched = False
            if self._device.type != "cpu":
                self._tensors = None
            self.mapped.release()


class Model:
    """What Loaded describes, with its base weights in place."""

    def __init__(self, loaded: Loaded) -> None:
        self.module, self.config, self.vocabulary = loaded.module, loaded.config, loaded.vocabulary
        self.device, self.dtype = loaded.device, loaded.dtype
        self.base = Weights(loaded.base, loaded.device)
        self._installed: Weights | None = None
        self._parameters = dict(self.module.named_parameters())
        text = self.config.get_text_config()
        self.n_layer, self.n_embd = int(text.num_hidden_layers), int(text.hidden_size)
        self._give_way: Callable[[], None] | None = None
        self._differentiates = False
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.module.forward).parameters
        configs: dict[int, Any] = {}
        for module in self.module.modules():
            if hasattr(config := getattr(module, "config", None), "_attn_implementation"):
                configs[id(config)] = config
        self.configs = list(configs.values())
        self._attention = [config._attn_implementation for config in self.configs]
        self.blocks = self._find_blocks()
        for block in self.blocks:
            block.register_forward_pre_hook(self._before_block, with_kwargs=True)
        self.install(self.base)

    @property
    def attention(self) -> str:
        """The name of the model's own attention."""
        return str(self._attention[0])

    @property
    def pads(self) -> bool:
        """Whether numbers of rows are rounded up."""
        return self.dtype == torch.bfloat16 and self.device.type == "cpu"

    def install(self, weights: Weights) -> None:
        """Computes with these from now on."""
        if weights is self._installed and weights.touched:
            return
        for name, tensor in weights.tensors.items():
            self._parameters[name].data = tensor
        self._installed = weights

    def uninstall(self, weights: Weights) -> None:
        """Lets go of weights that are to be given up."""
        if self._installed is weights:
            self.install(self.base)

    @contextmanager
    def giving_way(self, give_way: Callable[[], None]) -> Iterator[None]:
        """Within it `give_way` is called before every block. It may let others compute (`set_aside`), or raise."""
        self._give_way = give_way
        try:
            yield
        finally:
            self._give_way = None

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within it the module is as if nothing was being computed with it; the caller installs weights again."""
        previous = self._give_way, self._differentiates
        self._give_way, self._differentiates = None, False
        try:
            with as_made(self.module), attention(self.configs, self._attention), torch.inference_mode(False):
                yield
        finally:
            self._give_way, self._differentiates = previous

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Within it a forward keeps what a backward needs; a backward gives way at every block, as a forward does."""
        self._differentiates = True
        try:
            with torch.enable_grad():
                yield
        finally:
            self._differentiates = False

    def forward(
        self, tokens: Sequence[int], keep: Sequence[int], *, multiple: int = PRODUCT_ROWS, **arguments: Any
    ) -> torch.Tensor:
        """Logits (len(keep), n_vocab) in float32 after the rows `keep` of one row of tokens; where the model pads,
        more than one are computed as a `multiple`."""
        ids = torch.tensor([tokens], device=self.device)
        rows = list(keep)
        if self.pads and len(rows) > 1:
            rows += [rows[-1]] * (-len(rows) % multiple)
        if self._keeps_logits:
            arguments["logits_to_keep"] = torch.tensor(rows, device=self.device)
        with nullcontext() if self._differentiates else torch.inference_mode():
            logits = self.module(input_ids=ids, **arguments).logits[0]
            if not self._keeps_logits:
                logits = logits[rows]
            return torch.as_tensor(logits[: len(keep)].float())

    def hidden(self, tokens: Sequence[int], **arguments: Any) -> torch.Tensor:
        """The states (tokens, n_embd) in float32 behind the final norm, from which the head makes logits."""
        ids = torch.tensor([tokens], device=self.device)
        with torch.inference_mode():
            base: nn.Module = self.module.base_model  # type: ignore[assignment]  # of every model of transformers
            output = base(input_ids=ids, use_cache=True, **arguments)
            return torch.as_tensor(output.last_hidden_state[0].float())

    def _before_block(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pause()
        if self._differentiates:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(self._pause)  # type: ignore[no-untyped-call]  # torch's own

    def _pause(self, _gradient: torch.Tensor | None = None) -> None:
        if self._give_way is not None:
            self._give_way()

    def _find_blocks(self) -> list[nn.Module]:
        """The model's blocks; every linear layer where they are in no list."""
        try:
            return list(block_list(self.module, self.n_layer))
        except ValueError:
            return [module for module in self.module.modules() if isinstance(module, nn.Linear)]
