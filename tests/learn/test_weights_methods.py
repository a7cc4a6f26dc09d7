"""Every method beside MeZO on the weights: what it computes, and that it learns."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weights_samples import language_loss, one_thread, same, task_loss, tiny, weights

from agentd.learn.weights import adazeta, lora
from agentd.learn.weights.adamw import AdamW
from agentd.learn.weights.bp import Backpropagation
from agentd.learn.weights.cached_trunk import CachedTrunk, InMemory
from agentd.learn.weights.elasticzo import ElasticZO
from agentd.learn.weights.layers import layer_of
from agentd.learn.weights.loho import Hybrid
from agentd.learn.weights.lora import Beside
from agentd.learn.weights.mezo import InPlace
from agentd.learn.weights.structure import blocks_of, split

EPSILON, BLOCKS = 1e-3, 3

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def value(loss: Callable[[], Tensor]) -> float:
    with torch.no_grad():
        return float(loss())


def descended(model: nn.Module, loss: Callable[[], Tensor], lr: float) -> dict[str, Tensor]:
    """The weights after one plain SGD step by autograd."""
    loss().backward()  # type: ignore[no-untyped-call]
    found = {n: (p if p.grad is None else p - lr * p.grad).detach() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_bp_is_stochastic_gradient_descent(checkpointing: bool, tied: bool) -> None:
    model = tiny(tied=tied)
    loss = language_loss(model)
    expected, before = descended(model, loss, 0.1), value(loss)
    assert Backpropagation(model, checkpointing=checkpointing).step(loss, 0.1, 0) == pytest.approx(before)
    for name, found in weights(model).items():
        torch.testing.assert_close(found, expected[name])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())


def test_checkpointing_keeps_fewer_activations() -> None:
    def kept(checkpointing: bool) -> int:
        model, sizes = tiny(blocks=6), []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        bp, loss = Backpropagation(model, checkpointing=checkpointing), language_loss(model)

        def watched() -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return loss()

        bp.step(watched, 0.0, 0)
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


def test_bp_of_bf16_weights_is_reproducible_and_small_steps_count() -> None:
    found = []
    for seed in (1, 1, 2):
        model = tiny(torch.bfloat16)
        before = weights(model)
        Backpropagation(model).step(language_loss(model), 1e-4, seed)
        found.append(weights(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])
    assert not same(found[0], before)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = tiny()
    before, loss = weights(model), language_loss(model)
    steps: list[Callable[[], Any]] = [
        lambda: Backpropagation(model).step(lambda: loss() * float("nan"), 0.1, 0),
        lambda: ElasticZO(model, 0).step(lambda: loss() * float("nan"), 0, EPSILON, 0.1, 0.1),
        lambda: ElasticZO(model, 1).step(lambda: loss() * float("nan"), 0, EPSILON, 0.1, 0.1),
    ]
    for step in steps:
        with pytest.raises(ArithmeticError, match="nothing to descend from"):
            step()
        assert same(weights(model), before)


def test_elasticzo_of_every_block_is_bp() -> None:
    model, copy = tiny(), tiny()
    for seed in range(3):
        ElasticZO(model, BLOCKS).step(language_loss(model), seed, EPSILON, 1e-3, 0.1)
        Backpropagation(copy).step(language_loss(copy), 0.1, seed)
    assert same(weights(model), weights(copy))


def test_elasticzo_of_no_block_is_mezo() -> None:
    model, copy = tiny(), tiny()
    theta = InPlace(copy)
    for seed in range(3):
        losses = ElasticZO(model, 0).step(language_loss(model), seed, EPSILON, 1e-3, 0.1)
        plus, minus = theta.pair(seed, EPSILON, language_loss(copy))
        assert (losses.plus, losses.minus) == (plus, minus)
        theta.update(seed, -1e-3 * (plus - minus) / (2 * EPSILON))
    assert same(weights(model), weights(copy))


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_elasticzo_takes_gradients_from_the_minus_pass(kind: str, tied: bool) -> None:
    model, copy, k, epsilon = tiny(tied=tied, kind=kind), tiny(tied=tied, kind=kind), 1, 0.05
    elastic = ElasticZO(model, k)
    assert elastic.zo is not None
    losses = elastic.step(language_loss(model), 4, epsilon, 1e-3, 0.1)
    assert losses.projected_gradient == pytest.approx((losses.plus - losses.minus) / (2 * epsilon))
    # By hand: the trunk of the copy stands at theta - eps z while autograd differentiates by the suffix.
    twin = InPlace(copy, parameters=elastic.split.trunk.__contains__)
    start = weights(copy)
    twin.update(4, -epsilon)
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(name in elastic.split.suffix)
    cut = [m.register_forward_hook(lambda _m, _i, y: y.detach()) for m in split(copy, k).shared]
    expected = descended(copy, language_loss(copy), 0.1)
    assert len(cut) == (1 if tied else 0)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(start[name])
    twin.update(4, -1e-3 * losses.projected_gradient)
    for name, parameter in model.named_parameters():
        twice = expected[name] if name in elastic.split.suffix else dict(copy.named_parameters())[name]
        torch.testing.assert_close(parameter.detach(), twice.detach(), rtol=1e-4, atol=1e-5)


def test_the_split_of_a_model() -> None:
    model = tiny(tied=True)
    one = split(model, 1)
    assert one.trunk | one.suffix == {name for name, _ in model.named_parameters()}
    assert not one.trunk & one.suffix
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= one.suffix
    assert all(f"layers.{BLOCKS - 1}." in name for name in one.suffix if "layers" in name)
    assert len(one.shared) == 1
    apart = split(model, 1, tied=False)
    assert one.suffix - apart.suffix == {"model.embed_tokens.weight"} <= apart.trunk
    assert apart.shared == []
    assert split(model, BLOCKS, tied=False).trunk == frozenset()
    assert split(model, 0).suffix == frozenset()
    assert split(model, BLOCKS).trunk == frozenset()
    assert "model.embed_tokens.weight" in split(tiny(tied=False), 1).trunk
    with pytest.raises(ValueError, match="k = 4"):
        split(model, 4)
    with pytest.raises(ValueError, match="no blocks"):
        blocks_of(nn.Linear(2, 2))


def test_gradients_of_several_forwards_are_applied_as_those_of_one() -> None:
    model, copy = tiny(), tiny()
    whole, parts = Backpropagation(model), Backpropagation(copy)
    whole.step(language_loss(model), 0.1, 3)
    with parts.trained():
        for _ in range(2):
            torch.autograd.backward(language_loss(copy)() / 2)
    parts.apply(0.1, 3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights(copy)[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in copy.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cached_trunk_gives_the_same_losses_and_gradients(kind: str) -> None:
    model, copy = tiny(kind=kind), tiny(kind=kind)
    states = InMemory()
    cache = CachedTrunk(model, 1, states)
    bp, plain = Backpropagation(model, cache.split.suffix), Backpropagation(copy, cache.split.suffix)
    calls: list[int] = []
    handle = blocks_of(model)[0].get_submodule("mlp").register_forward_pre_hook(lambda *_: calls.append(1))
    cut = [module.register_forward_hook(lambda _m, _i, y: y.detach()) for module in split(copy, 1).shared]
    for step in range(6):
        with cache.batch(step % 2):
            found = bp.step(task_loss(model, step % 2), 0.05, step)
        assert found == pytest.approx(plain.step(task_loss(copy, step % 2), 0.05, step), rel=1e-5)
    handle.remove()
    assert len(calls) == 2
    assert len(cut) == 1
    assert states.nbytes == 2 * 8 * 12 * 32 * 4
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, dict(copy.named_parameters())[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no trunk"):
        CachedTrunk(model, BLOCKS, states)


@pytest.mark.parametrize(("kind", "layers"), [("llama", 7), ("gpt2", 4)])
def test_lora_starts_as_the_model_and_comes_off(kind: str, layers: int) -> None:
    model = tiny(kind=kind)
    before, loss = weights(model), language_loss(model)
    start = value(loss)
    changes = lora.beside(model, 4, 8.0, seed=1)
    assert len(changes.names) == layers * BLOCKS
    learn(changes, loss)
    with changes.attached():
        assert value(loss) < start
    assert value(loss) == start
    assert same(weights(model), before)
    assert all("forward" not in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="no linear layer"):
        lora.beside(nn.Embedding(3, 4), 4, 8.0, seed=1)


def learn(changes: Beside, loss: Callable[[], Tensor], steps: int = 5, lr: float = 1e-2) -> None:
    descent = AdamW(changes)
    for step in range(steps):
        with descent.trained(), changes.attached():
            torch.autograd.backward(loss())
        descent.apply(lr, step)
    assert not any(p.requires_grad or p.grad is not None for p in changes.parameters())


def test_changes_have_the_gradients_of_the_layers_they_stand_beside() -> None:
    model = tiny()
    loss, changes = language_loss(model), lora.beside(model, 4, 8.0, seed=1)
    descent = AdamW(changes)
    with descent.trained(), changes.attached():
        torch.autograd.backward(loss())
    model.zero_grad()
    torch.autograd.backward(loss())
    layers = dict(model.named_modules())
    for name, change in zip(changes.names, changes.changes, strict=True):
        gradient = layers[name].weight.grad
        assert isinstance(gradient, Tensor)
        assert isinstance(change, lora.LowRank)
        torch.testing.assert_close(change.lora_b.grad, change.scale * gradient @ change.lora_a.T, rtol=1e-3, atol=1e-6)


def test_lora_with_a_frozen_trains_b_alone() -> None:
    names = [name for name, _ in lora.beside(tiny(), 4, 8.0, seed=1, freeze_a=True).named_parameters()]
    assert names
    assert all(name.endswith("lora_b") for name in names)


class Unusual(nn.Linear):
    """A layer of a class of its own that multiplies all the same, as some models have."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


def test_what_multiplies_by_a_matrix_is_a_layer_whatever_it_is_called() -> None:
    from transformers.pytorch_utils import Conv1D

    plain, unusual, conv = nn.Linear(3, 5), Unusual(3, 5, bias=False), Conv1D(5, 3)
    found = [layer_of(module) for module in (plain, unusual, conv)]
    assert [(each.n_in, each.n_out, each.transposed) for each in found if each] == [
        (3, 5, False),
        (3, 5, False),
        (3, 5, True),
    ]
    assert layer_of(Router(3, 5)) is None
    assert layer_of(nn.Embedding(3, 5)) is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # the latter keeps its matrices transposed
@pytest.mark.parametrize("make", [lambda m: lora.beside(m, 4, 8.0, seed=1), lambda m: adazeta.beside(m, 3, seed=1)])
def test_merged_changes_are_the_attached_ones(make: Callable[[nn.Module], Beside], kind: str) -> None:
    model = tiny(kind=kind)
    loss, changes = language_loss(model), make(model)
    learn(changes, loss)
    with changes.attached():
        wanted, start = value(loss), loss()
    layers = dict(model.named_modules())
    for number, (name, (a, b)) in enumerate(changes.factors().items()):
        layer = layer_of(layers[name])
        assert layer is not None
        lora.merge(layer.weight, *layer.as_stored(a, b), number)
    assert value(loss) == pytest.approx(wanted, rel=1e-5)
    assert start.requires_grad  # of the model itself, which nothing has frozen


def test_merging_gives_the_same_bits_on_any_number_of_threads_and_rounds_without_bias() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1000, 577, generator=generator)  # no multiple of anything
    a, b = torch.randn(8, 577, generator=generator), torch.randn(1000, 8, generator=generator) * 1e-3
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            merged = weight.clone().to(dtype)
            lora.merge(merged, a, b, 7)
            found.append(merged)
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    torch.testing.assert_close(found[0], weight + b @ a)
    change, kept = b @ a, found[1].float() - weight.to(torch.bfloat16).float()
    # below the last bit of most weights, and not lost all the same
    assert float((kept * change).sum() / (change * change).sum()) == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="do not fit"):
        lora.merge(weight, a, b.T, 7)


def test_tensor_train_is_the_matrix_of_its_cores() -> None:
    layer = adazeta.TTLinear(12, 20, 3, torch.Generator().manual_seed(0))
    a, b = layer.factors()
    matrix = torch.einsum("aib,bjc,cod,dpe->ijop", layer.core_1, layer.core_2, layer.core_3, layer.core_4).reshape(
        12, 20
    )
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ matrix)
    torch.testing.assert_close((b @ a).T, matrix)
    assert adazeta.factors(576) == (24, 24)
    assert adazeta.factors(13) == (1, 13)


def test_tensor_trains_are_small_and_start_as_the_model() -> None:
    model = tiny()
    start = value(language_loss(model))
    changes = adazeta.beside(model, 2, seed=1)
    with changes.attached():
        assert value(language_loss(model)) == pytest.approx(start)
    trained, all_of_it = (sum(p.numel() for p in module.parameters()) for module in (changes, model))
    assert 0 < trained < 0.2 * all_of_it


def test_the_hybrid_takes_turns() -> None:
    model = tiny()
    hybrid = Hybrid(model, 4)
    assert [hybrid.is_bp(step) for step in range(6)] == [True, False, False, False, True, False]
    with pytest.raises(ValueError, match="period"):
        Hybrid(model, 0)


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


def beside(model: nn.Module, changes: Beside, queries: int = 1) -> Iterator[None]:
    with changes.attached():
        yield from zeroth_order(model, InPlace(changes), 1e-2, queries)


def mezo_lora(model: nn.Module) -> Iterator[None]:
    return beside(model, lora.beside(model, 4, 8.0, seed=1))


def adapters(model: nn.Module) -> Iterator[None]:
    return beside(model, adazeta.beside(model, 2, seed=1), queries=2)


def bp(model: nn.Module) -> Iterator[None]:
    method = Backpropagation(model)
    for seed in range(1000):
        method.step(task_loss(model, seed), 0.03, seed)
        yield


def elasticzo(model: nn.Module) -> Iterator[None]:
    method = ElasticZO(model, 1)
    for seed in range(1000):
        method.step(task_loss(model, seed), seed, EPSILON, 1e-4, 0.03)
        yield


def loho(model: nn.Module) -> Iterator[None]:
    method = Hybrid(model, 5)
    for seed in range(1000):
        method.step(seed, task_loss(model, seed), EPSILON, 1e-4, 0.03)
        yield


@pytest.mark.parametrize("method", [mezo, sparse_mezo, mezo_lora, adapters, bp, elasticzo, loho])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_lowers_the_loss(method: Callable[[nn.Module], Iterator[None]], dtype: torch.dtype) -> None:
    model = tiny(dtype, blocks=2)
    before = value(task_loss(model))
    run = method(model)
    for _ in range(40):
        next(run)
    assert value(task_loss(model)) < 0.95 * before
