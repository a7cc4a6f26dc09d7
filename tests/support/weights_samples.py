"""Small causal models with real architectures and random weights, and a task that they can learn."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

VOCABULARY, LENGTH, BATCH = 96, 12, 8
_IDS = torch.randint(3, VOCABULARY, (4 * BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
_LABELS = _IDS[:, 0] % 2


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small compute for less time than threads take to meet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(dtype: torch.dtype = torch.float32, *, blocks: int = 3, tied: bool = True, kind: str = "llama") -> nn.Module:
    """A model in eval mode; the same arguments give the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=blocks,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=tied,
                initializer_range=0.2,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=blocks, n_head=4, n_positions=64, bos_token_id=1)
        )
    cast: nn.Module = model.to(dtype).eval()
    return cast


def language_loss(model: nn.Module) -> Callable[[], Tensor]:
    """Next-token cross-entropy of one fixed batch."""
    ids = _IDS[:BATCH]

    def loss() -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return cross_entropy(logits[:, :-1].float().reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))

    return loss


def task_loss(model: nn.Module, batch: int | None = None) -> Callable[[], Tensor]:
    """Token 1 or 2 after the text, by the parity of its first token: mini-batch `batch`, or all."""
    rows = slice(None) if batch is None else slice(batch % 4 * BATCH, (batch % 4 + 1) * BATCH)

    def loss() -> Tensor:
        logits: Tensor = model(input_ids=_IDS[rows], use_cache=False, logits_to_keep=1).logits
        return cross_entropy(logits[:, -1, 1:3].float(), _LABELS[rows])

    return loss


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
