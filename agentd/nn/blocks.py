"""A contiguous range of a model's blocks in torch, built from its GGUF with transformers' own modules.

transformers' model runs as it is, on the tapped input, with every block outside the range replaced by one that passes
its input on: attention masks, rotary embeddings, layer types and sliding windows then come from transformers. Only
the range's tensors and the final norm are dequantised; the embedding and the head never become float32 matrices.

Dequantising takes a fraction of the time that multiplying does, so a range need not be in memory as a whole: one block
at a time is made where it is needed, in memory that the next one uses again.

Anything this file assumes of an architecture is checked on the model itself when it is built, with random input.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from agentd.errors import TrainerFailed
from agentd.nn.fused_ops import fuse
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.linear_ops import exactly, frozen
from agentd.nn.matrix import Matrix, keep_in_file, part_space, weight_of
from agentd.nn.meta_model import IdentityBlock, MetaModel, Unsupported
from agentd.nn.tree_mask import Tree

__all__ = ["Blocks", "Place", "Unsupported"]


@dataclass(frozen=True)
class Place:
    """Where a tensor of the file belongs: the attribute `leaf` of `module`, in the block `block` (None: the norm).

    name       transformers' own, by which the model may no longer find it: parts of a block are replaced when it trains
    owner      (module, attribute) that holds `module`
    as_stored  whether the tensor's rows are in torch's order as they are in the file
    shared     whether other tensors of the file belong to the same attribute, or this one to others too
    """

    tensor: str
    name: str
    block: int | None
    module: nn.Module
    leaf: str
    owner: tuple[nn.Module, str]
    as_stored: bool
    shared: bool

    @property
    def is_matrix(self) -> bool:
        """Of a linear layer."""
        return self.leaf == "weight" and isinstance(self.module, nn.Linear)

    @property
    def is_plain(self) -> bool:
        """Whether it is the matrix of a linear layer just as the file has it."""
        return self.as_stored and self.is_matrix


class Blocks:
    """Blocks [first, end) of the model in `file`, their weights frozen.

    control   per block index a vector of n_embd that is added to that block's output (llama.cpp's control vector)
    in_memory all of the range is in memory and runs; otherwise one block, the one `activate` was called for last
    streamed  matrices of linear layers stay in the file: a part of one is made whenever it is multiplied
    dtype     of the matrices of linear layers; everything else, inputs and outputs included, is float32

    After construction:
    linears  per GGUF tensor name, (owner module, attribute) of every linear layer stored as torch holds it
    norm     the final norm
    fused    the parts of a block that run as one operation each
    apart    a row's prefix attends apart from what follows it, see Tree.attended
    """

    def __init__(
        self,
        file: GGUFFile,
        first: int,
        end: int,
        control: dict[int, torch.Tensor] | None = None,
        in_memory: bool = True,
        dtype: torch.dtype = torch.float32,
        streamed: bool = False,
    ) -> None:
        self.file, self.dtype, self.in_memory, self._streamed = file, dtype, in_memory, streamed
        frame = MetaModel(file)
        self.config, self.model = frame.config, frame.module
        self.n_blocks, self.n_embd = frame.n_blocks, int(frame.config.hidden_size)
        if not 0 <= first < end <= self.n_blocks:
            raise TrainerFailed(f"there are no blocks {first} to {end - 1} in a model of {self.n_blocks} blocks")
        self.first, self.end = first, end
        self.base: nn.Module = self.model.base_model
        self._layers = frame.blocks
        self._own = {i: self._layers[i] for i in range(first, end)}
        self._stand_ins = [IdentityBlock(layer) for layer in self._layers]
        self._tensors = frame.tensors
        # LFM2's file calls its final norm by the name of another family's norm behind the embedding.
        norms = (name for name in ("output_norm", "token_embd_norm") if f"{name}.weight" in self._tensors.names)
        self._norm_name = next(norms, None)
        self._places = self._find_places()
        self._space: dict[tuple[str, torch.dtype, torch.Size], torch.Tensor] = {}
        self.linears = {
            place.tensor: place.owner for places in self._places.values() for place in places if place.is_plain
        }
        self.norm = self._take_norm()
        if streamed:
            self._leave_in_file()
        for i, block in self._own.items():
            if control and i in control:
                _add_to_output(block, control[i])
            if streamed or dtype != torch.float32:
                for module in block.modules():
                    if isinstance(module, nn.Linear):
                        module.forward = partial(_frozen_layer, module)  # type: ignore[method-assign]
        self.entry, self.apart = 1.0, True
        self._active: int | None = None
        if in_memory:
            self._put(range(first, end))
            for i in range(first, end):
                self._load(i)
        else:
            self.activate(end - 1)
        with exactly():
            self.fused = fuse(self._own.values(), self.last)
            self._check_ends()

    @property
    def last(self) -> nn.Module:
        """The last block of the range."""
        return self._own[self.end - 1]

    def set(self, linear: tuple[nn.Module, str], module: nn.Module) -> None:
        setattr(*linear, module)

    def activate(self, block: int) -> None:
        """Puts this block's weights into memory, in place of the one before; from now on it runs alone."""
        if self.in_memory:
            raise TrainerFailed("all blocks are in memory; none of them runs alone")
        if block != self._active:
            self._put(range(block, block + 1))
            self._load(block)
            self._active = block

    @contextlib.contextmanager
    def only_last(self) -> Iterator[None]:
        """Lets the last block run alone: for what concerns no other, and would take as many times longer."""
        if not self.in_memory:
            yield
            return
        self._put(range(self.end - 1, self.end))
        try:
            yield
        finally:
            self._put(range(self.first, self.end))

    def run(self, inputs: torch.Tensor, tree: Tree | None = None) -> torch.Tensor:
        """What comes out (rows, tokens, n_embd) for an input of the same shape, before the final norm.

        tree  what the tokens of the only row see
        """
        scaled = inputs if self.entry == 1.0 else inputs * self.entry
        with contextlib.ExitStack() as stack:
            attention: dict[str, Any] = {}
            if tree is not None:
                attention = stack.enter_context(tree.attended(self.base.config, apart=self.apart))
            output = self.base(inputs_embeds=scaled, use_cache=False, **attention)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _put(self, blocks: range) -> None:
        """Lets these blocks run, and passes on what the others would have done."""
        for i, stand_in in enumerate(self._stand_ins):
            self._layers[i] = self._own[i] if i in blocks else stand_in

    def _find_places(self) -> dict[int | None, list[Place]]:
        """Where the tensors of the range and the final norm belong, from their names and shapes: nothing is read."""
        places: dict[int | None, list[Place]] = {i: [] for i in (*self._own, None)}
        for tensor in self.file.tensors:
            block = next((i for i in self._own if tensor.startswith(f"blk.{i}.")), None)
            if block is None and not (self._norm_name and tensor.startswith(f"{self._norm_name}.")):
                continue
            others: dict[str, Any] = {}
            stored = np.broadcast_to(np.float32(0), self.file.shape(tensor))
            converted = self._tensors.convert(tensor, stored, others)
            if converted is None:
                places[block] += [self._place(tensor, block, name, None, False) for name in others]
            else:
                places[block].append(
                    self._place(tensor, block, converted[0], converted[1].shape, converted[1] is stored)
                )
        return places

    def _place(
        self, tensor: str, block: int | None, name: str, converted_shape: tuple[int, ...] | None, as_stored: bool
    ) -> Place:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        expected = module._parameters.get(leaf, module._buffers.get(leaf))
        shape = None if expected is None else tuple(expected.shape)
        if shape is None or converted_shape not in (None, shape):
            raise Unsupported(self.file.path, f"{name} has the shape {converted_shape}, expected {shape}")
        owner, _, attribute = path.rpartition(".")
        # Rows that the loader reorders would need the LoRA matrices reordered too, so these stay without.
        return Place(
            tensor,
            name,
            block,
            module,
            leaf,
            (self.model.get_submodule(owner), attribute),
            as_stored,
            converted_shape is None,
        )

    def _load(self, block: int | None) -> None:
        """Dequantises a block (or the norm) into its modules."""
        others: dict[str, Any] = {}
        for place in self._places[block]:
            if self._streamed and place.is_plain:
                continue
            dtype = self.dtype if place.is_matrix else torch.float32
            shape = torch.Size(self.file.shape(place.tensor))
            if place.as_stored:
                weights = self.file.load(place.tensor, dtype, out=self._memory(place, "", dtype, shape))
            else:
                stored = self.file.load(place.tensor, out=self._memory(place, " as stored", torch.float32, shape))
                converted = self._tensors.convert(place.tensor, stored.numpy(), others)
                if converted is None:
                    continue
                turned = torch.from_numpy(converted[1])
                weights = self._memory(place, "", dtype, turned.shape).copy_(turned)
            _fill(place.module, place.leaf, weights)
        composed = {place.name: place for place in self._places[block] if place.shared}
        for name, weights in others.items():
            _fill(composed[name].module, composed[name].leaf, weights)

    def _leave_in_file(self) -> None:
        places = [place for i in self._own for place in self._places[i] if place.is_plain]
        space = part_space(self.dtype, max((self.file.shape(place.tensor)[1] for place in places), default=0))
        for place in places:
            keep_in_file(place.module, Matrix(self.file, place.tensor, self.dtype, space))

    def _memory(self, place: Place, use: str, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        """Room for a tensor: of its own where all blocks stay, else the room its like of another block had."""
        if self.in_memory or place.block is None:
            return torch.empty(shape, dtype=dtype)
        key = (place.tensor.partition(f"blk.{place.block}.")[2] + use, dtype, shape)
        if key not in self._space:
            self._space[key] = torch.empty(shape, dtype=dtype)
        return self._space[key]

    def _take_norm(self) -> nn.Module:
        """Takes the final norm out of the model, whose output then is that of the range."""
        if self._norm_name is None:
            raise Unsupported(self.file.path, "no final norm is known for its architecture")
        self._load(None)
        path = self._tensors.names[f"{self._norm_name}.weight"].rpartition(".")[0]
        norm: nn.Module = self.model.get_submodule(path)
        owner, _, attribute = path.rpartition(".")
        setattr(self.model.get_submodule(owner), attribute, nn.Identity())
        placed = {(id(place.module), place.leaf) for places in self._places.values() for place in places}
        for part in (*self._own.values(), norm):
            for name, module in part.named_modules():
                for leaf, value in (*module._parameters.items(), *module._buffers.items()):
                    if value is None or not value.is_meta or (id(module), leaf) in placed:
                        continue
                    if leaf == "bias":  # some families' files leave out those that are zero
                        _fill(module, leaf, torch.zeros(value.shape))
                    else:
                        raise Unsupported(self.file.path, f"the file has no tensor for {name}.{leaf}")
        norm.requires_grad_(False)
        return norm

    def _check_ends(self) -> None:
        """Finds out how the model passes its input to the blocks, and that it passes their output on unchanged."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(2, 5, self.n_embd, generator=generator)
        seen: dict[str, torch.Tensor] = {}

        def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen["in"] = args[0] if args else kwargs["hidden_states"]

        def leaving(_: nn.Module, __: Any, output: Any) -> None:
            seen["out"] = output[0] if isinstance(output, tuple) else output

        hooks = [
            (self._own[self.first] if self.in_memory else self.last).register_forward_pre_hook(
                entering, with_kwargs=True
            ),
            self.last.register_forward_hook(leaving),
        ]
        problem = "it runs its blocks in a way that is not known here"
        try:
            for as_tuple in (False, True):
                for stand_in in self._stand_ins:
                    stand_in.as_tuple = as_tuple
                seen.clear()
                try:
                    with torch.no_grad():
                        output = self.run(inputs)
                except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
                    if not as_tuple or not isinstance(error, (TypeError, AttributeError)):
                        problem = f"{type(error).__name__}: {error}"  # rather than what comes of handing on a tuple
                    continue
                if seen["in"].shape != inputs.shape or not torch.equal(seen["out"], output):
                    continue
                # Some models scale embeddings on their way in; the tap was taken after that.
                factor = (seen["in"] / inputs).flatten()
                if torch.allclose(factor, factor.mean(), rtol=1e-3):
                    scale = factor.mean().item()
                    self.entry = 1.0 if abs(scale - 1) < 1e-6 else 1 / scale
                    return
        finally:
            for hook in hooks:
                hook.remove()
        raise Unsupported(self.file.path, problem)


def _fill(module: nn.Module, leaf: str, weights: torch.Tensor) -> None:
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(weights, requires_grad=False)
    else:
        module._buffers[leaf] = weights


def _frozen_layer(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return frozen(x, weight_of(layer), layer.bias)


def _add_to_output(block: nn.Module, vector: torch.Tensor) -> None:
    def add(_: nn.Module, __: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    block.register_forward_hook(add)
