"""Reads what a directory of transformers says of its model: config.json and the tables of its safetensors files.

Standard library only, for the daemon; what is missing, cut short or not a causal language model raises
ModelUnusable and nothing else.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd.errors import ModelUnusable
from agentd.formats.safetensors_header import read_table

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class CheckpointHeader:
    """A causal language model in a directory. `shapes` are those of all tensors by name, `files` what identifies it."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: tuple[Path, ...]
    tensor_bytes: int

    @property
    def architecture(self) -> str:
        return str(self.config["model_type"])

    @property
    def name(self) -> str | None:
        return None

    @property
    def context_length(self) -> int | None:
        """Tokens that it was trained for."""
        return self.number("max_position_embeddings", "n_positions", "max_seq_len")

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def number(self, *names: str) -> int | None:
        """The first of these sizes that the configuration has, in its own text part where it has one."""
        text = self.config.get("text_config")
        for tree in (self.config, text if isinstance(text, dict) else {}):
            for name in names:
                value = tree.get(name)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None


def read_checkpoint(path: Path) -> CheckpointHeader:
    """The header of the model in the directory `path`. Raises ModelUnusable."""
    config = _json(path / CONFIG)
    kind, classes = config.get("model_type"), config.get("architectures") or []
    if not isinstance(kind, str) or not isinstance(classes, list):
        raise ModelUnusable(path, f"its {CONFIG} names no model_type")
    if classes and not any(str(name).endswith(_CAUSAL) for name in classes):
        raise ModelUnusable(path, f"it is no causal language model, but {', '.join(map(str, classes))}")
    files = sorted(path.glob("*.safetensors"))
    if (path / INDEX).exists():
        indexed = {str(name) for name in _json(path / INDEX).get("weight_map", {}).values()}
        if missing := sorted(indexed - {file.name for file in files}):
            raise ModelUnusable(path, f"{missing[0]} is missing ({len(missing)} of {len(indexed)} files)")
        files = [file for file in files if file.name in indexed]
    if not files:
        other = "; it has weights in another format, which are not loaded" if any(path.glob("*.bin")) else ""
        raise ModelUnusable(path, f"there are no safetensors files in it{other}")
    tokenizers = [path / name for name in _TOKENIZERS if (path / name).exists()]
    if not tokenizers:
        raise ModelUnusable(path, f"it has no tokenizer ({', '.join(_TOKENIZERS)})")
    shapes: dict[str, tuple[int, ...]] = {}
    size = 0
    for file in files:
        table = read_table(file).tensors
        shapes |= {name: tuple(facts["shape"]) for name, facts in table.items()}
        size += sum(facts["data_offsets"][1] - facts["data_offsets"][0] for facts in table.values())
    extra = [path / "tokenizer_config.json"] if (path / "tokenizer_config.json").exists() else []
    return CheckpointHeader(config, shapes, (path / CONFIG, *files, *tokenizers, *extra), size)


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelUnusable(path.parent, f"there is no {path.name} in it") from None
    except OSError as error:
        raise ModelUnusable(path, error.strerror or str(error)) from None
    except (ValueError, RecursionError):
        raise ModelUnusable(path, "it is not valid JSON") from None
    if not isinstance(tree, dict):
        raise ModelUnusable(path, "it does not hold a JSON object")
    return tree
