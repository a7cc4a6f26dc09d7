"""The trainer's loss and gradients are those of full autograd through transformers' own model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from agentd.trainer.blocks import Blocks
from agentd.trainer.blockwise import Blockwise
from agentd.trainer.gguf_file import GGUFFile
from agentd.trainer.learner import Learner
from agentd.trainer.loop import make_learner
from agentd.trainer.resident import Resident
from agentd.trainer.shortcuts import Suffix
from agentd.trainer.spec import Example, parse_spec

PLACES = {
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def parse_examples(examples: list[dict[str, Any]], prefix: int) -> list[Example]:
    spec = {"model": "m", "first_block": 0, "end_block": 1, "tap": {"path": "t", "n_embd": 1}, "output": "o"}
    return list(parse_spec({**spec, "prefix": {"offset": 0, "n": prefix}, "examples": examples}).examples)


def reference_loss(reference: Any, tokens: list[list[int]], examples: list[Example], nll_weight: float) -> torch.Tensor:
    """The objective written down again with torch's own functions on the full logits of one sequence at a time."""
    losses, at = [], 0
    for example in examples:
        logs = []
        for sequence in tokens[at : at + len(example.sequences)]:
            logs.append(reference(torch.tensor([sequence])).logits[0].log_softmax(-1))
        at += len(example.sequences)
        nll = -torch.stack([logs[t.sequence][t.position, t.token] for t in example.target]).mean()
        if example.choices:
            sums = [sum(logs[t.sequence][t.position, t.token] for t in choice) for choice in example.choices]
            nll = torch.nn.functional.cross_entropy(torch.stack(sums), torch.tensor(example.correct)) + nll_weight * nll
        losses.append(nll)
    mean: torch.Tensor = torch.stack(losses).mean()
    return mean


@dataclass
class Golden:
    """Random LoRA matrices (the same for every range that has their block), the loss and its gradients."""

    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]
    loss: float
    gradients: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @contextmanager
    def attached(self, reference: Any) -> Iterator[None]:
        """The reference model adapted by the matrices."""
        hooks = []
        for tensor, (a, b) in self.matrices.items():
            _, block, name, _ = tensor.split(".")

            def add(_: Any, x: Any, y: torch.Tensor, a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
                update: torch.Tensor = 16.0 / 4 * (x[0] @ a.T) @ b.T
                return y + update

            layer = reference.model.layers[int(block)].get_submodule(PLACES[name])
            hooks.append(layer.register_forward_hook(add))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@pytest.fixture(scope="module")
def golden(reference: Any, reviews: Any) -> Callable[[int], Golden]:
    """golden(k): full autograd through the reference model, with LoRA (rank 4, alpha 16) in its last k blocks."""

    @cache
    def compute(blocks: int) -> Golden:
        generator = torch.Generator().manual_seed(7)
        matrices = {}
        for block in range(30 - blocks, 30):
            for name, place in PLACES.items():
                module = reference.model.layers[block].get_submodule(place)
                a = torch.randn(4, module.in_features, generator=generator) / module.in_features**0.5
                b = 0.02 * torch.randn(module.out_features, 4, generator=generator)
                matrices[f"blk.{block}.{name}.weight"] = (a.requires_grad_(), b.requires_grad_())
        golden = Golden(matrices, 0.0, {})
        with golden.attached(reference):
            examples = parse_examples(reviews.examples, len(reviews.prefix))
            loss = reference_loss(reference, reviews.tokens, examples, nll_weight=0.1)
            loss.backward()  # type: ignore[no-untyped-call]
        for name, (a, b) in matrices.items():
            assert a.grad is not None
            assert b.grad is not None
            golden.gradients[name] = (a.grad, b.grad)
        golden.loss = loss.item()
        return golden

    return compute


RESIDENT = [(1, {}), (3, {}), (3, {"micro_tokens": 60})]
ONE_AT_A_TIME = [(1, {"checkpoint": True}), (3, {"checkpoint": True}), (3, {"checkpoint": True, "micro_tokens": 60})]


@pytest.mark.parametrize(("blocks", "train"), [*RESIDENT, *ONE_AT_A_TIME])
def test_loss_and_gradients_are_those_of_full_autograd(
    blocks: int, train: dict[str, Any], golden: Callable[[int], Golden], write_tap: Any, make_spec: Any
) -> None:
    expected = golden(blocks)
    options = {"rank": 4, "alpha": 16.0, "nll_weight": 0.1, **train}
    learner = make_learner(parse_spec(make_spec(blocks, write_tap(30 - blocks), train=options)))
    start_from(learner, expected)
    examples = learner.spec.examples
    if isinstance(learner, Blockwise):
        at = learner.checkpoints(examples)
        loss, n = learner.backward(at, 1 / len(examples)), len(at.batches)
    else:
        assert isinstance(learner, Resident)
        loss, n = learner.gradients(examples), len(learner.micro_batches(examples))
    assert isinstance(learner, Blockwise) == ("checkpoint" in train)
    assert learner.suffix.reduced
    assert learner.suffix.shares_prefix == ("micro_tokens" not in train)  # in small ones each sequence has its own
    assert (n > 1) == ("micro_tokens" in train)
    compare(learner, expected, loss)
    before = [matrix.detach().clone() for matrix in learner.parameters]
    assert learner.step(examples, 1e-3) == pytest.approx(expected.loss, rel=1e-4)
    assert all(not torch.equal(now, then) for now, then in zip(learner.parameters, before, strict=True))
    assert learner.evaluate(examples).loss < expected.loss


@pytest.mark.parametrize(("blocks", "train"), [(30, {}), (30, {"micro_tokens": 60}), (4, {})])
def test_the_engines_taps_give_the_gradients_of_full_autograd_in_every_block(
    blocks: int, train: dict[str, Any], golden: Callable[[int], Golden], reference: Any, reviews: Any, make_spec: Any
) -> None:
    expected = golden(blocks)
    options = {"rank": 4, "alpha": 16.0, "nll_weight": 0.1, **train}
    learner = make_engine_learner(blocks, options, expected, reference, reviews, make_spec)
    examples = learner.spec.examples
    at = learner.checkpoints(examples)
    compare(learner, expected, learner.backward(at, 1 / len(examples)))


def make_engine_learner(
    blocks: int, options: dict[str, Any], expected: Golden, reference: Any, reviews: Any, make_spec: Any
) -> Blockwise:
    """A learner that asks for its checkpoints, and the reference model, adapted as it is, answering."""
    first = 30 - blocks
    n_prefix = len(reviews.prefix)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        assert request["ask"] == "tap"
        assert (request["first"], request["end"]) == (first, 30)
        states: list[torch.Tensor] = []
        places, row = [], n_prefix
        with expected.attached(reference), torch.no_grad():
            for number in request["examples"]:
                placed = []
                for tokens in reviews.tokens[2 * number : 2 * number + len(reviews.examples[number]["sequences"])]:
                    hidden = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states[first:30]
                    states.append(torch.cat(hidden)[:, 0 if not states else n_prefix :])
                    placed.append([row, len(tokens) - n_prefix])
                    row += placed[-1][1]
                places.append(placed)
        Path(request["path"]).write_bytes(torch.cat(states, dim=1).numpy().tobytes())
        return {"prefix_rows": n_prefix, "sequences": places}

    tap = make_spec(blocks, Path("unused"))["output"] + ".tap"
    examples = [{**example, "number": i} for i, example in enumerate(reviews.examples)]
    made = make_spec(blocks, tap, train=options, from_engine=True, examples=examples)
    learner = make_learner(parse_spec(made), answer)
    assert isinstance(learner, Blockwise)
    start_from(learner, expected)
    return learner


def start_from(learner: Learner, expected: Golden) -> None:
    assert set(learner.lora) == set(expected.matrices)
    for name, layer in learner.lora.items():
        layer.a.data, layer.b.data = (matrix.detach().clone() for matrix in expected.matrices[name])


def compare(learner: Learner, expected: Golden, loss: float) -> None:
    assert loss == pytest.approx(expected.loss, rel=1e-4)
    error = size = 0.0
    for name, pair in expected.gradients.items():
        layer = learner.lora[name]
        for mine, theirs in zip((layer.a.grad, layer.b.grad), pair, strict=True):
            assert mine is not None
            apart = (mine - theirs).norm().item()
            assert theirs.norm() > 0
            assert apart <= 5e-4 * theirs.norm().item(), name
            error, size = error + apart**2, size + theirs.norm().item() ** 2
    assert error**0.5 <= 1e-4 * size**0.5


def test_a_range_in_the_middle_is_the_reference_models(model_path: Path, reference: Any, reviews: Any) -> None:
    blocks = Blocks(GGUFFile(model_path), 10, 13)
    assert sorted({name.split(".")[1] for name in blocks.linears}) == ["10", "11", "12"]
    with torch.no_grad():
        hidden = reference(torch.tensor([reviews.tokens[0]]), output_hidden_states=True).hidden_states
        ours = blocks.run(hidden[10])
    assert torch.allclose(ours, hidden[13], rtol=1e-4, atol=1e-4 * hidden[13].abs().max().item())


def test_the_control_vector_is_added_behind_its_block(model_path: Path) -> None:
    file, vector = GGUFFile(model_path), torch.linspace(-1, 1, 576)
    plain, both = Blocks(file, 28, 30), Blocks(file, 28, 30, {28: vector, 29: 2 * vector, 3: vector})
    second = Blocks(file, 29, 30)
    inputs = torch.randn(2, 6, 576, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = plain._own[28]  # one block alone, by running the range up to it
        seen: list[torch.Tensor] = []
        hook = first.register_forward_hook(lambda _, __, out: seen.append(out))
        plain.run(inputs)
        hook.remove()
        expected = second.run(seen[0] + vector) + 2 * vector
        assert torch.allclose(both.run(inputs), expected, rtol=1e-4, atol=1e-3)


def test_gemma3_with_windows_and_norms_is_transformers_own(gemma3_path: Path) -> None:
    """Blocks 3 and 4 slide over 8 tokens, block 5 sees everything; the embeddings are scaled before block 0."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gemma3_path.parent, gguf_file=gemma3_path.name, dtype=torch.float32)
    model = model.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(0, 260, (1, 12), generator=generator)
    tokens = torch.cat([prefix.expand(3, -1), torch.randint(0, 260, (3, 14), generator=generator)], dim=1)
    hidden = model(tokens, output_hidden_states=True).hidden_states
    file = GGUFFile(gemma3_path)
    for first, end in ((0, 2), (2, 5), (3, 6)):
        blocks = Blocks(file, first, end)
        seen: list[torch.Tensor] = []
        hook = model.model.layers[end - 1].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        model(tokens)
        hook.remove()
        assert torch.allclose(blocks.run(hidden[first]), seen[0], rtol=1e-4, atol=1e-4)

    suffix = Suffix(Blocks(file, 3, 6))
    assert suffix.shares_prefix
    assert "mlp" in suffix.reduced
    assert not any("k_" in name or "v_" in name for name in suffix.reduced)
    at = [(0, 25), (1, 13), (2, 20), (2, 21)]
    ours = suffix(hidden[3][:1, :12], hidden[3][:, 12:], at)
    assert torch.allclose(ours, torch.stack([seen[0][s, p] for s, p in at]), rtol=1e-4, atol=1e-4)
    early = suffix(hidden[3][:1, :12], hidden[3][:, 12:], [(1, 11)])  # scored inside the prefix
    assert torch.allclose(early[0], seen[0][1, 11], rtol=1e-4, atol=1e-4)
