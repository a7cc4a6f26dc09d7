"""Backpropagation from given gradients of outputs gives torch's own gradients, and brings no sympy into the process."""

import subprocess
import sys

import pytest
import torch

from agentd.nn.vjp import vjp


def test_the_gradient_is_that_of_torchs_own_backward() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    one, other = (2 * x).sin(), x[0] ** 2
    gradients = torch.arange(12.0).view(3, 4), torch.tensor([1.0, -2.0, 0.0, 5.0])
    expected = torch.autograd.grad((one, other), x, gradients, retain_graph=True)
    end = vjp([(one, gradients[0]), (other, gradients[1])])
    assert torch.equal(torch.autograd.grad(end, x)[0], expected[0])
    assert end.item() == 0


def test_a_gradient_of_another_shape_is_refused() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"a gradient of shape \(1,\) for an output of shape \(3,\)"):
        vjp([(x * 2, torch.ones(1))])


@pytest.mark.slow
def test_sympy_stays_out_of_the_process() -> None:
    program = (
        "import sys, torch; from agentd.nn.vjp import vjp; x = torch.ones(2, requires_grad=True);"
        "vjp([(x * 2, torch.ones(2))]).backward(); assert x.grad.tolist() == [2.0, 2.0];"
        "sys.exit('sympy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
