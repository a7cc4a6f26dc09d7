"""From a safetensors directory or a GGUF file to a model of transformers whose weights are mapped from disk.

The model is built without weights; its parameters then point into an image (image.py). A directory whose tensors are
stored as they are served needs no other file. Otherwise the image is written once, tensor by tensor, into the state
directory: a GGUF is dequantised there, another precision converted.
"""

import contextlib
import inspect
import io
import logging
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agentd.durable import replacement
from agentd.engine.transformers import image as images
from agentd.engine.transformers.image import Image
from agentd.engine.transformers.vocabulary import Vocabulary
from agentd.errors import AgentdError, ModelUnusable
from agentd.host.cpu import multiplies_bf16
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.meta_model import Unsupported, build, read_config, scale_rope, tensor_map

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """What `model.path` names. `key` identifies its content; `folder` is where images and tokenizers are kept."""

    path: Path
    folder: Path
    key: str

    @property
    def is_gguf(self) -> bool:
        return not self.path.is_dir()

    @property
    def arguments(self) -> dict[str, str]:
        """Where transformers finds it. Nothing is ever fetched or executed."""
        if self.is_gguf:
            return {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name}
        return {"pretrained_model_name_or_path": str(self.path)}


@dataclass(frozen=True)
class Loaded:
    module: nn.Module
    config: Any
    base: Image
    vocabulary: Vocabulary
    device: torch.device
    dtype: torch.dtype


def choose(dtype: str, device: torch.device) -> torch.dtype:
    """The type that weights are served and learn in: bfloat16 where the processor multiplies it, else float32."""
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.bfloat16 if device.type == "cuda" or multiplies_bf16() else torch.float32


def load(source: Source, dtype: str = "auto", device: str = "auto") -> Loaded:
    """Raises ModelUnusable."""
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kind = choose(dtype, place)
    with _quiet(source.path):
        config = _config(source)
        module = _build(config, kind)
        if source.is_gguf:
            scale_rope(GGUFFile(source.path), module)
        if "past_key_values" not in inspect.signature(module.forward).parameters:
            raise ModelUnusable(
                source.path, "it keeps no keys and values but a state of its own (its GGUF may run in engine llamacpp)"
            )
        base = _base(source, module, config, kind)
        vocabulary = _vocabulary(source, config)
    _install_buffers(source, module, place)
    return Loaded(module, config, base, vocabulary, place, kind)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape in the model's order; one that is shared counts once."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


@contextlib.contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """transformers raises anything it meets, and shows progress bars. Raises ModelUnusable in its place."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a name in a configuration must not become a download
    from transformers.utils import logging as their_logging

    their_logging.disable_progress_bar()
    their_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except AgentdError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelUnusable(path, f"transformers cannot load it: {reason[:400]}") from None


def _config(source: Source) -> Any:
    from transformers import AutoConfig

    if source.is_gguf:
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        file = GGUFFile(source.path)
        name = file.header.architecture
        if name not in GGUF_SUPPORTED_ARCHITECTURES and name.replace("moe", "_moe") not in GGUF_SUPPORTED_ARCHITECTURES:
            # its vocabulary could not be read
            raise ModelUnusable(source.path, f"transformers does not know GGUFs of architecture {name!r}")
        try:
            return read_config(file)[0]
        except Unsupported as error:
            raise ModelUnusable(source.path, f"transformers does not know it: {error.reason}") from None
    return AutoConfig.from_pretrained(**source.arguments, trust_remote_code=False)


def _build(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model without its weights: memory that was never touched takes none."""
    model: nn.Module = build(config, dtype)
    model.tie_weights()  # type: ignore[operator]  # transformers' own
    return model.requires_grad_(False)


def _base(source: Source, module: nn.Module, config: Any, dtype: torch.dtype) -> Image:
    """The image that the base is served from; made if there is none."""
    shapes = shapes_of(module)
    if not source.is_gguf:
        files = sorted(source.path.glob("*.safetensors"))
        if not files:
            raise ModelUnusable(source.path, "there are no safetensors files in it")
        stored = images.read(files)
        if (image := images.arranged(stored, shapes, dtype)) is not None:
            return image
    source.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = source.folder / f"base-{source.key[:16]}-{str(dtype).partition('.')[2]}.safetensors"
    if path.exists():
        image = images.arranged(images.read([path]), shapes, dtype)
        if image is not None:
            return image
    logger.info("writing %s as it will be served to %s", source.path, path)
    with replacement(path) as temporary:
        created = images.create(temporary, ((name, shape, dtype) for name, shape in shapes.items()))
        target = created.open(mmap.ACCESS_WRITE).tensors
        if source.is_gguf:
            _dequantise(source, module, config, target)
        else:
            _convert(source, dtype, target)
    image = images.arranged(images.read([path]), shapes, dtype)
    assert image is not None
    return image


def _dequantise(source: Source, module: nn.Module, config: Any, target: Mapping[str, torch.Tensor]) -> None:
    """Writes a GGUF's tensors, one in memory at a time."""
    file = GGUFFile(source.path)
    tensors = tensor_map(file, module, *read_config(file))
    others: dict[str, torch.Tensor] = {}  # of which the file has parts (experts)
    written = set()
    for name in file.tensors:
        converted = tensors.convert(name, file.load(name).numpy(), others)
        if converted is not None and converted[0] in target:
            target[converted[0]].copy_(torch.from_numpy(converted[1]))
            written.add(converted[0])
    for name, weights in others.items():
        if name in target:
            target[name].copy_(weights)
            written.add(name)
    if missing := sorted(set(target) - written):
        raise ModelUnusable(source.path, f"it has no tensor for {missing[0]} ({len(missing)} missing)")


def _convert(source: Source, dtype: torch.dtype, target: Mapping[str, torch.Tensor]) -> None:
    """Has transformers read a directory whose tensors are stored in another way than they are served."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        **source.arguments, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ModelUnusable(source.path, f"it has no tensor for {missing[0]} ({len(missing)} missing)")
    for name, parameter in model.named_parameters():
        target[name].copy_(parameter)


def _install_buffers(source: Source, module: nn.Module, device: torch.device) -> None:
    """Buffers that a checkpoint holds are few and small; they are read, and never learn."""
    persistent = set(module.state_dict()) - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    stored = {}
    if persistent and not source.is_gguf:
        mapped = images.read(sorted(source.path.glob("*.safetensors"))).open()
        stored = {name: tensor for name, tensor in mapped.tensors.items() if name in persistent}
    for name, buffer in list(module.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        value = stored[name].to(buffer.dtype).clone() if name in stored else buffer
        module.get_submodule(owner)._buffers[leaf] = value.to(device)


def _vocabulary(source: Source, config: Any) -> Vocabulary:
    from transformers import AutoTokenizer

    saved = source.folder / f"tokenizer-{source.key[:16]}"
    if source.is_gguf and (saved / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(str(saved), trust_remote_code=False)
    else:
        tokenizer = AutoTokenizer.from_pretrained(**source.arguments, trust_remote_code=False)
        if source.is_gguf:  # reading a vocabulary out of a GGUF takes seconds and far more memory than it does
            tokenizer.save_pretrained(str(saved))
    if not getattr(tokenizer, "is_fast", False):
        raise ModelUnusable(source.path, "its tokenizer has no fast form (tokenizer.json)")
    ends = getattr(config, "eos_token_id", None)
    end_ids = [ends] if isinstance(ends, int) else list(ends or [])
    with contextlib.suppress(OSError):
        from transformers import GenerationConfig

        if not source.is_gguf:
            more = GenerationConfig.from_pretrained(str(source.path)).eos_token_id
            end_ids += [more] if isinstance(more, int) else list(more or [])
    size = int(getattr(config.get_text_config(), "vocab_size", 0) or len(tokenizer))
    return Vocabulary(tokenizer, end_ids, size)
