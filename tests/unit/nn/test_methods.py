"""The parts that methods are made of beside MeZO on the weights: what each computes, and that it learns."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agentd.nn import lora, tensor_train
from agentd.nn.adamw import AdamW
from agentd.nn.backprop import SGD, checkpointed
from agentd.nn.linear_layer import layer_of
from agentd.nn.lora import AdapterSet
from agentd.nn.mezo import InPlace
from agentd.nn.structure import block_list, split
from agentd.nn.trunk_cache import CachedTrunk
from tests.support.weights_samples import language_loss, one_thread, same, task_loss, tiny, weights

EPSILON, BLOCKS = 1e-3, 3

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def value(loss: Callable[[], Tensor]) -> float:
    with torch.no_grad():
        return float(loss())


def descended(model: nn.Module, loss: Callable[[], Tensor], lr: float) -> dict[str, Tensor]:
    """The weights after one plain SGD step by autograd."""
    loss().backward()  # type: ignore[no-untyped-call]
    updated = {n: (p if p.grad is None else p - lr * p.grad).detach() for n, p in model.named_parameters()}
    model.zero_grad()
    return updated


def step(sgd: SGD, loss: Callable[[], Tensor], lr: float, seed: int, blocks: Sequence[nn.Module] = ()) -> float:
    """One step on the mini-batch of `loss`, with checkpointing in these blocks; returns the loss before it."""
    with sgd.trained(), checkpointed(blocks):
        before = loss()
        torch.autograd.backward(before)
    sgd.apply(lr, seed)
    return float(before.detach())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_bp_is_stochastic_gradient_descent(checkpointing: bool, tied: bool) -> None:
    model = tiny(tied=tied)
    loss = language_loss(model)
    expected, before = descended(model, loss, 0.1), value(loss)
    assert step(SGD(model), loss, 0.1, 0, list(block_list(model)) if checkpointing else ()) == pytest.approx(before)
    for name, parameter in weights(model).items():
        torch.testing.assert_close(parameter, expected[name])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.slow
def test_checkpointing_keeps_fewer_activations() -> None:
    def activation_bytes(checkpointing: bool) -> int:
        model, sizes = tiny(blocks=6), []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        loss = language_loss(model)

        def watched() -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return loss()

        step(SGD(model), watched, 0.0, 0, list(block_list(model)) if checkpointing else ())
        return sum(sizes)

    assert activation_bytes(True) < 0.5 * activation_bytes(False)


def test_bp_of_bf16_weights_is_reproducible_and_small_steps_count() -> None:
    runs = []
    for seed in (1, 1, 2):
        model = tiny(torch.bfloat16)
        before = weights(model)
        step(SGD(model), language_loss(model), 1e-4, seed)
        runs.append(weights(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert not same(runs[0], before)


def test_the_split_of_a_model() -> None:
    model = tiny(tied=True)
    one = split(model, 1)
    assert one.trunk | one.suffix == {name for name, _ in model.named_parameters()}
    assert not one.trunk & one.suffix
    assert "model.norm.weight" in one.suffix
    assert all(f"layers.{BLOCKS - 1}." in name for name in one.suffix if "layers" in name)
    assert "model.embed_tokens.weight" in one.trunk  # the head too, which is tied to it
    untied = split(tiny(tied=False), 1)
    assert "lm_head.weight" in untied.suffix
    assert "model.embed_tokens.weight" in untied.trunk
    assert split(model, 0).suffix == frozenset()
    assert split(model, BLOCKS).trunk == frozenset()
    with pytest.raises(ValueError, match="k = 4"):
        split(model, 4)
    with pytest.raises(ValueError, match="no blocks"):
        block_list(nn.Linear(2, 2))


def test_gradients_of_several_forwards_are_applied_as_those_of_one() -> None:
    model, copy = tiny(), tiny()
    whole, parts = SGD(model), SGD(copy)
    step(whole, language_loss(model), 0.1, 3)
    with parts.trained():
        for _ in range(2):
            torch.autograd.backward(language_loss(copy)() / 2)
    parts.apply(0.1, 3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights(copy)[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in copy.parameters())


class InMemory:
    """Trunk states as they are, for mini-batches that always have the same examples."""

    def __init__(self) -> None:
        self.states: dict[Any, Tensor] = {}

    def knows(self, key: Any) -> bool:
        return key in self.states

    def put(self, key: Any, state: Tensor) -> None:
        self.states[key] = state

    def get(self, key: Any, like: Tensor) -> Tensor:
        return self.states[key]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cached_trunk_gives_the_same_losses_and_gradients(kind: str) -> None:
    model, copy = tiny(kind=kind), tiny(kind=kind)
    states = InMemory()
    cache = CachedTrunk(model, 1, states)
    bp, plain = SGD(model, cache.split.suffix), SGD(copy, cache.split.suffix)
    calls: list[int] = []
    handle = block_list(model)[0].get_submodule("mlp").register_forward_pre_hook(lambda *_: calls.append(1))
    for seed in range(6):
        with cache.batch(seed % 2):
            loss = step(bp, task_loss(model, seed % 2), 0.05, seed)
        assert loss == pytest.approx(step(plain, task_loss(copy, seed % 2), 0.05, seed), rel=1e-5)
    handle.remove()
    assert len(calls) == 2
    assert [tuple(state.shape) for state in states.states.values()] == [(8, 12, 32)] * 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, dict(copy.named_parameters())[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no trunk"):
        CachedTrunk(model, BLOCKS, states)


@pytest.mark.parametrize(("kind", "layers"), [("llama", 7), ("gpt2", 4)])
def test_lora_starts_as_the_model_and_comes_off(kind: str, layers: int) -> None:
    model = tiny(kind=kind)
    before, loss = weights(model), language_loss(model)
    start = value(loss)
    adapters = lora.adapters(model, 4, 8.0, seed=1)
    assert len(adapters.names) == layers * BLOCKS
    learn(adapters, loss)
    with adapters.attached():
        assert value(loss) < start
    assert value(loss) == start
    assert same(weights(model), before)
    assert all("forward" not in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="no linear layer"):
        lora.adapters(nn.Embedding(3, 4), 4, 8.0, seed=1)


def learn(adapters: AdapterSet, loss: Callable[[], Tensor], steps: int = 5, lr: float = 1e-2) -> None:
    optimiser = AdamW(adapters.requires_grad_(False).parameters())
    for step in range(steps):
        with optimiser.trained(), adapters.attached():
            torch.autograd.backward(loss())
        optimiser.apply(lr, step)
    assert not any(p.requires_grad or p.grad is not None for p in adapters.parameters())


def test_adapters_have_the_gradients_of_the_layers_they_stand_beside() -> None:
    model = tiny()
    loss, adapters = language_loss(model), lora.adapters(model, 4, 8.0, seed=1)
    optimiser = AdamW(adapters.requires_grad_(False).parameters())
    with optimiser.trained(), adapters.attached():
        torch.autograd.backward(loss())
    model.zero_grad()
    torch.autograd.backward(loss())
    layers = dict(model.named_modules())
    for name, adapter in zip(adapters.names, adapters.adapters, strict=True):
        gradient = layers[name].weight.grad
        assert isinstance(gradient, Tensor)
        assert isinstance(adapter, lora.LowRank)
        torch.testing.assert_close(adapter.b.grad, adapter.scale * gradient @ adapter.a.T, rtol=1e-3, atol=1e-6)


class Unusual(nn.Linear):
    """A layer of a class of its own that multiplies all the same, as some models have."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


def test_what_multiplies_by_a_matrix_is_a_layer_under_any_name() -> None:
    from transformers.pytorch_utils import Conv1D

    plain, unusual, conv = nn.Linear(3, 5), Unusual(3, 5, bias=False), Conv1D(5, 3)
    layers = [layer_of(module) for module in (plain, unusual, conv)]
    assert [(each.n_in, each.n_out, each.transposed) for each in layers if each] == [
        (3, 5, False),
        (3, 5, False),
        (3, 5, True),
    ]
    assert layer_of(Router(3, 5)) is None
    assert layer_of(nn.Embedding(3, 5)) is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the latter keeps its matrices transposed
@pytest.mark.parametrize(
    "make", [lambda m: lora.adapters(m, 4, 8.0, seed=1), lambda m: tensor_train.adapters(m, 3, seed=1)]
)
def test_merged_adapters_are_the_attached_ones(make: Callable[[nn.Module], AdapterSet], kind: str) -> None:
    model = tiny(kind=kind)
    loss, adapters = language_loss(model), make(model)
    learn(adapters, loss)
    with adapters.attached():
        expected, start = value(loss), loss()
    layers = dict(model.named_modules())
    for number, (name, (a, b)) in enumerate(adapters.factors().items()):
        layer = layer_of(layers[name])
        assert layer is not None
        lora.merge(layer.weight, *layer.as_stored(a, b), number)
    assert value(loss) == pytest.approx(expected, rel=1e-5)
    assert start.requires_grad  # of the model itself, which nothing has frozen


def test_merging_gives_the_same_bits_on_any_number_of_threads_and_rounds_without_bias() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1000, 577, generator=generator)  # no multiple of anything
    a, b = torch.randn(8, 577, generator=generator), torch.randn(1000, 8, generator=generator) * 1e-3
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            merged = weight.clone().to(dtype)
            lora.merge(merged, a, b, 7)
            results.append(merged)
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    torch.testing.assert_close(results[0], weight + b @ a)
    change, rounded = b @ a, results[1].float() - weight.to(torch.bfloat16).float()
    # below the last bit of most weights, and not lost all the same
    assert float((rounded * change).sum() / (change * change).sum()) == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="do not fit"):
        lora.merge(weight, a, b.T, 7)


def test_tensor_train_is_the_matrix_of_its_cores() -> None:
    layer = tensor_train.TTLinear(12, 20, 3, torch.Generator().manual_seed(0))
    a, b = layer.factors()
    matrix = torch.einsum("aib,bjc,cod,dpe->ijop", layer.core_1, layer.core_2, layer.core_3, layer.core_4).reshape(
        12, 20
    )
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ matrix)
    torch.testing.assert_close((b @ a).T, matrix)
    assert tensor_train.factors(576) == (24, 24)
    assert tensor_train.factors(13) == (1, 13)


def test_tensor_trains_are_small_and_start_as_the_model() -> None:
    model = tiny()
    start = value(language_loss(model))
    adapters = tensor_train.adapters(model, 2, seed=1)
    with adapters.attached():
        assert value(language_loss(model)) == pytest.approx(start)
    trained, all_of_it = (sum(p.numel() for p in module.parameters()) for module in (adapters, model))
    assert 0 < trained < 0.2 * all_of_it


def zeroth_order(model: nn.Module, theta: InPlace, lr: float, queries: int = 1) -> Iterator[None]:
    for step in range(1000):
        for query in range(queries):
            seed = step * queries + query
            plus, minus = theta.pair(seed, EPSILON, task_loss(model))
            theta.update(seed, -lr * (plus - minus) / (2 * EPSILON) / queries)
        yield


def mezo(model: nn.Module) -> Iterator[None]:
    return zeroth_order(model, InPlace(model), 3e-4)


def sparse_mezo(model: nn.Module) -> Iterator[None]:
    return zeroth_order(model, InPlace(model, sparsity=0.75), 1e-3)


def train(model: nn.Module, adapters: AdapterSet, queries: int = 1) -> Iterator[None]:
    with adapters.attached():
        yield from zeroth_order(model, InPlace(adapters), 1e-2, queries)


def mezo_lora(model: nn.Module) -> Iterator[None]:
    return train(model, lora.adapters(model, 4, 8.0, seed=1))


def adazeta(model: nn.Module) -> Iterator[None]:
    return train(model, tensor_train.adapters(model, 2, seed=1), queries=2)


def bp(model: nn.Module) -> Iterator[None]:
    sgd = SGD(model)
    for seed in range(1000):
        step(sgd, task_loss(model, seed), 0.03, seed)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("method", [mezo, sparse_mezo, mezo_lora, adazeta, bp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_lowers_the_loss(method: Callable[[nn.Module], Iterator[None]], dtype: torch.dtype) -> None:
    model = tiny(dtype, blocks=2)
    before = value(task_loss(model))
    run = method(model)
    for _ in range(40):
        next(run)
    assert value(task_loss(model)) < 0.95 * before
