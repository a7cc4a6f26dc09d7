import pytest
import torch
from torch import Tensor, nn

from agentd.learn.ledger import Step
from agentd.nn import perturbation
from agentd.nn.directions import Direction
from agentd.nn.mezo import InPlace
from tests.support.weights_samples import language_loss, one_thread, same, tiny, weights

EPSILON = 1e-3

pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["one_thread"]


def direction(theta: InPlace, seed: int, distribution: str) -> dict[str, Tensor]:
    source = Direction(distribution)
    return {
        name: source.piece(seed, number, 0, p.numel(), torch.float32, p.device).view(p.shape)
        for name, (number, p) in theta.theta.items()
    }


def moved(model: nn.Module, start: dict[str, Tensor], z: dict[str, Tensor], scale: float) -> None:
    """theta = start + scale z by plain assignment."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in z:
                parameter.copy_(torch.add(start[name], z[name].to(parameter.dtype), alpha=scale))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_those_of_perturbed_weights(kind: str, distribution: str, dtype: torch.dtype) -> None:
    model, copy = tiny(dtype, kind=kind), tiny(dtype, kind=kind)
    theta, before = InPlace(model, distribution=distribution), weights(model)
    plus, minus = theta.pair(3, 0.05, language_loss(model))
    z = direction(theta, 3, distribution)
    for sign, loss in ((1, plus), (-1, minus)):
        moved(copy, before, z, sign * 0.05)
        with torch.no_grad():
            expected = float(language_loss(copy)())
        assert loss == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-2)
    assert plus != minus
    assert same(weights(model), before)


def test_large_matrices_go_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    whole = InPlace(model).pair(3, 0.05, language_loss(model))
    monkeypatch.setattr(perturbation, "PERTURBED_PIECE", 512)
    assert InPlace(model).pair(3, 0.05, language_loss(model)) == pytest.approx(whole, rel=1e-6)


def test_plain_mezo_equals_the_published_procedure_step_for_step() -> None:
    model, copy = tiny(), tiny()
    theta, loss = InPlace(model, distribution="gaussian"), language_loss(model)
    lr = 1e-3
    for seed in range(10):
        # The reference perturbs in place, as algorithm 1 of the paper does: +eps, -2 eps, +eps, update.
        z = direction(theta, seed, "gaussian")
        losses = []
        with torch.no_grad():
            for scale in (EPSILON, -2 * EPSILON):
                for name, parameter in copy.named_parameters():
                    parameter.add_(z[name], alpha=scale)
                losses.append(float(language_loss(copy)()))
            g = (losses[0] - losses[1]) / (2 * EPSILON)
            for name, parameter in copy.named_parameters():
                parameter.add_(z[name], alpha=EPSILON)
                parameter.add_(z[name], alpha=-lr * g)
        plus, minus = theta.pair(seed, EPSILON, loss)
        assert (plus, minus) == pytest.approx(losses, rel=1e-5)
        theta.update(seed, -lr * (plus - minus) / (2 * EPSILON))
    for name, parameter in copy.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_projected_gradient_is_the_directional_derivative(distribution: str) -> None:
    model = tiny()
    theta, loss = InPlace(model, distribution=distribution), language_loss(model)
    loss().backward()  # type: ignore[no-untyped-call]
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradient.keys() == theta.theta.keys()
    norm = sum(float((g * g).sum()) for g in gradient.values()) ** 0.5  # the standard deviation of z'g
    for seed in range(3):
        z = direction(theta, seed, distribution)
        slope = sum(float((g * z[name]).sum()) for name, g in gradient.items())
        plus, minus = theta.pair(seed, EPSILON, loss)
        assert (plus - minus) / (2 * EPSILON) == pytest.approx(slope, abs=0.02 * norm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "sparsity", "n"), [(torch.float32, None, 200), (torch.bfloat16, None, 200), (torch.bfloat16, 0.75, 20)]
)
def test_replay_is_bit_exact(dtype: torch.dtype, sparsity: float | None, n: int) -> None:
    model, again = tiny(dtype, blocks=1), tiny(dtype, blocks=1)
    theta, loss = InPlace(model, sparsity=sparsity), language_loss(model)
    steps = []
    for seed in range(n):
        plus, minus = theta.pair(seed, EPSILON, loss)
        steps.append(Step(seed, (plus - minus) / (2 * EPSILON), 1e-4, EPSILON))
        theta.update(seed, steps[-1].coefficient)
    torch.set_num_threads(2)
    InPlace(again, sparsity=sparsity).replay(steps)
    assert same(weights(model), weights(again))
    assert not same(weights(model), weights(tiny(dtype, blocks=1)))


def test_updates_far_below_a_bf16_step_are_not_lost() -> None:
    model = nn.Linear(512, 512, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    model.to(torch.bfloat16)
    theta = InPlace(model)
    for seed in range(8):
        theta.update(seed, 1e-4)
    z = sum(direction(theta, seed, "rademacher")["weight"] for seed in range(8))
    assert isinstance(z, Tensor)
    # Along z the mean movement is what fp32 would have done; five standard errors of rounding to steps of 2^-7 or 2^-8
    along = float(((model.weight.detach().float() - 1.0) * z).mean())
    error = 5 * (8 * 8 * 1e-4 * 2**-7 / z.numel()) ** 0.5
    assert along == pytest.approx(8e-4, abs=error)


def test_tied_weights_count_once() -> None:
    tied, untied = tiny(tied=True), tiny(tied=False)
    assert len(InPlace(tied).theta) == len(InPlace(untied).theta) - 1


def test_selection_leaves_the_rest_alone_and_keeps_z() -> None:
    model, all_of_it = tiny(), tiny()
    before = weights(model)
    InPlace(model, parameters=lambda name: "mlp" in name).update(1, 1e-2)
    InPlace(all_of_it).update(1, 1e-2)
    after, whole = weights(model), weights(all_of_it)
    for name in after:
        assert torch.equal(after[name], whole[name] if "mlp" in name else before[name])


def test_sparse_mezo_moves_the_small_entries_only() -> None:
    model = tiny()
    before = weights(model)
    theta = InPlace(model, sparsity=0.75)
    theta.update(1, 1e-3)
    for name, after in weights(model).items():
        still = after == before[name]
        if name in theta.thresholds:
            assert torch.equal(still, before[name].abs() > theta.thresholds[name])
            assert float(still.float().mean()) == pytest.approx(0.75, abs=0.01)
        else:
            assert not still.any()
    # The forward sees the same mask: a model whose large entries are all that the loss depends on has equal losses.
    again = InPlace(tiny(), thresholds=theta.thresholds)
    assert again.thresholds == theta.thresholds


def test_the_mask_is_that_of_the_forward_too() -> None:
    model = nn.Linear(64, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.where(torch.arange(64) < 32, 1.0, 0.01))
    theta, x = InPlace(model, sparsity=0.5), (torch.arange(64) < 32).float()
    assert theta.pair(1, 0.1, lambda: model(x).sum()) == (32.0, 32.0)
    assert InPlace(model).pair(1, 0.1, lambda: model(x).sum()) != (32.0, 32.0)


def test_weights_are_clean_when_a_forward_is_broken_off() -> None:
    model = tiny()
    theta, before = InPlace(model), weights(model)

    class Preempted(Exception):
        pass

    def stop(*_: object) -> None:
        raise Preempted

    handle = model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(stop)
    with pytest.raises(Preempted):
        theta.pair(1, EPSILON, language_loss(model))
    handle.remove()
    assert same(weights(model), before)
    assert theta.loss(1, 0.0, language_loss(model)) == float(language_loss(tiny())().detach())
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        InPlace(tiny(), sparsity=sparsity)


def test_what_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="distribution 'cauchy'"):
        InPlace(tiny(), distribution="cauchy")
    with pytest.raises(ValueError, match="no parameter"):
        InPlace(tiny(), parameters=lambda name: False)
    with pytest.raises(ValueError, match=r"torch\.float16"):
        InPlace(tiny(torch.float16))
    with pytest.raises(ValueError, match="threshold"):
        InPlace(tiny(), thresholds={"nothing": 1.0})
