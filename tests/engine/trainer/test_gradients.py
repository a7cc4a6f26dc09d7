"""The trainer's loss and gradients are those of full autograd through transformers' own model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from agentd.engine.encode import encode
from agentd.learn.encoded import Encoded, shared_prefix
from agentd.nn import linear_ops
from agentd.nn.blocks import Blocks
from agentd.nn.gguf_file import GGUFFile
from agentd.nn.head import Head
from agentd.nn.tree_mask import Tree
from agentd.trainer.blockwise import Blockwise
from agentd.trainer.in_memory import InMemory
from agentd.trainer.learner import Learner
from agentd.trainer.loop import make_learner
from agentd.trainer.shortcuts import Suffix
from agentd.trainer.spec import parse_spec
from tests.engine.trainer.conftest import N_LAYER, Case, distinct, gemma3, write_encoded

PLACES = {
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def reference_loss(reference: Any, examples: list[Encoded], nll_weight: float) -> torch.Tensor:
    """The objective written down again with torch's own functions on the full logits of one sequence at a time."""
    losses = []
    for example in examples:
        logs = [reference(torch.tensor([sequence])).logits[0].log_softmax(-1) for sequence in example.sequences]
        nll = -torch.stack([logs[s][position, token] for s, position, token in example.target]).mean()
        if example.choices:
            sums = [sum(logs[s][position, token] for s, position, token in choice) for choice in example.choices]
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
        for block in range(N_LAYER - blocks, N_LAYER):
            for name, place in PLACES.items():
                module = reference.model.layers[block].get_submodule(place)
                a = torch.randn(4, module.in_features, generator=generator) / module.in_features**0.5
                b = 0.02 * torch.randn(module.out_features, 4, generator=generator)
                matrices[f"blk.{block}.{name}.weight"] = (a.requires_grad_(), b.requires_grad_())
        golden = Golden(matrices, 0.0, {})
        with golden.attached(reference):
            loss = reference_loss(reference, reviews.encoded, nll_weight=0.1)
            loss.backward()  # type: ignore[no-untyped-call]
        for name, (a, b) in matrices.items():
            assert a.grad is not None
            assert b.grad is not None
            golden.gradients[name] = (a.grad, b.grad)
        golden.loss = loss.item()
        return golden

    return compute


WAYS: list[tuple[int, dict[str, Any]]] = [(1, {}), (3, {}), (3, {"micro_tokens": 60}), (3, {"streamed": True})]


@pytest.mark.parametrize(
    ("blocks", "train"), [*WAYS, *((blocks, {"checkpoint": True, **train}) for blocks, train in WAYS)]
)
def test_loss_and_gradients_are_those_of_full_autograd(
    blocks: int, train: dict[str, Any], golden: Callable[[int], Golden], write_tap: Any, make_spec: Any
) -> None:
    expected = golden(blocks)
    options = {"rank": 4, "alpha": 16.0, "nll_weight": 0.1, **train}
    learner = make_learner(parse_spec(make_spec(blocks, write_tap(N_LAYER - blocks), options=options)))
    start_from(learner, expected)
    examples = learner.spec.examples
    if isinstance(learner, Blockwise):
        at = learner.checkpoints(examples)
        loss, n = learner.backward(at, 1 / len(examples)), len(at.batches)
    else:
        assert isinstance(learner, InMemory)
        loss, n = learner.gradients(examples), len(learner.micro_batches(examples))
    assert isinstance(learner, Blockwise) == ("checkpoint" in train)
    assert learner.suffix.reduced
    assert learner.suffix.shares
    assert learner.blocks.apart
    assert (n > 1) == ("micro_tokens" in train)
    compare(learner, expected, loss)
    before = [matrix.detach().clone() for matrix in learner.parameters]
    assert learner.step(examples, 1e-3) == pytest.approx(expected.loss, rel=1e-4)
    assert all(not torch.equal(now, then) for now, then in zip(learner.parameters, before, strict=True))
    assert learner.evaluate(examples).loss < expected.loss


@pytest.mark.parametrize(("blocks", "train"), [(N_LAYER, {}), (N_LAYER, {"micro_tokens": 60}), (4, {"streamed": True})])
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
    first = N_LAYER - blocks
    n_prefix = len(reviews.prefix)

    def hidden(tokens: list[int]) -> torch.Tensor:
        states = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states[first:N_LAYER]
        return torch.cat(states).transpose(0, 1)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        assert request["ask"] == "tap"
        assert (request["first"], request["end"]) == (first, N_LAYER)
        chosen = [reviews.encoded[number] for number in request["examples"]]
        with expected.attached(reference), torch.no_grad():
            states = distinct(n_prefix, chosen, hidden).transpose(0, 1)
        Path(request["path"]).write_bytes(states.contiguous().numpy().tobytes())
        return {"prefix_rows": n_prefix, "starts": Case(reviews.prefix, chosen, reviews.path).starts}

    tap = make_spec(blocks, Path("unused"))["output"] + ".tap"
    spec = make_spec(blocks, tap, options=options, states="asked")
    learner = make_learner(parse_spec(spec), answer)
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
    blocks = Blocks(GGUFFile(model_path), 2, 5)
    assert sorted({name.split(".")[1] for name in blocks.linears}) == ["2", "3", "4"]
    with torch.no_grad():
        hidden = reference(torch.tensor([reviews.tokens[0]]), output_hidden_states=True).hidden_states
        ours = blocks.run(hidden[2])
    assert torch.allclose(ours, hidden[5], rtol=1e-4, atol=1e-4 * hidden[5].abs().max().item())


def test_the_control_vector_is_added_behind_its_block(model_path: Path) -> None:
    file, vector = GGUFFile(model_path), torch.linspace(-1, 1, 576)
    plain, both = Blocks(file, 4, 6), Blocks(file, 4, 6, {4: vector, 5: 2 * vector, 3: vector})
    second = Blocks(file, 5, 6)
    inputs = torch.randn(2, 6, 576, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = plain._own[4]  # one block alone, by running the range up to it
        seen: list[torch.Tensor] = []
        hook = first.register_forward_hook(lambda _, __, out: seen.append(out))
        plain.run(inputs)
        hook.remove()
        expected = second.run(seen[0] + vector) + 2 * vector
        assert torch.allclose(both.run(inputs), expected, rtol=1e-4, atol=1e-3)


def test_gemma3_with_windows_and_norms_is_transformers_own(gemma3_path: Path) -> None:
    """Blocks 3 and 4 slide over 8 tokens, block 5 sees everything; the embeddings are scaled before block 0."""
    model = gemma3(gemma3_path)
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

    blocks = Blocks(file, 3, 6)
    suffix = Suffix(blocks)
    assert suffix.shares
    assert blocks.apart  # in block 5: the prefix is longer than the windows of the others
    assert "mlp" in suffix.reduced
    assert not any("k_" in name or "v_" in name for name in suffix.reduced)
    at = [(0, 25), (1, 13), (2, 20), (2, 21), (1, 11)]  # the last one inside the prefix
    rows = torch.tensor([p if p < 12 else p + 14 * s for s, p in at])
    tree = Tree.of(12, [(0, [14, 14, 14])])  # three answers, longer than the windows, to the same text
    one_row = torch.cat([hidden[3][:1, :12], *(hidden[3][s : s + 1, 12:] for s in range(3))], dim=1)
    assert torch.allclose(
        suffix(one_row, tree, rows), torch.stack([seen[0][s, p] for s, p in at]), rtol=1e-4, atol=1e-4
    )


def test_a_prefix_attends_without_a_mask(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns that each kernel sees: a prefix of 12 alone and causally, then what follows it, with a mask."""
    seen: list[tuple[int, int, bool]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        seen.append((query.shape[-2], key.shape[-2], how["is_causal"]))
        return kernel(query, key, value, **how)

    blocks = Blocks(GGUFFile(model_path), N_LAYER - 1, N_LAYER)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    blocks.run(torch.randn(1, 20, blocks.n_embd), Tree.of(12, [(3, [2, 1]), (2, [])]))
    assert seen == [(12, 12, True), (8, 20, False)]


def test_what_can_be_left_out_does_not_depend_on_rounding(
    gemma3_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor whose products in bfloat16 differ by half a percent between shapes has the same blocks: there every
    answer once got a row of its own, and a step took four times as long."""
    plain = linear_ops._multiply
    noise = torch.Generator().manual_seed(0)

    def rounded(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        y = plain(rows, matrix)
        exact = matrix.dtype == rows.dtype or linear_ops._exactly
        return y if exact else y * (1 + 0.004 * torch.randn(y.shape, generator=noise))

    monkeypatch.setattr(linear_ops, "_multiply", rounded)
    for path in (model_path, gemma3_path):
        file = GGUFFile(path)
        expected, blocks = Suffix(Blocks(file, 0, N_LAYER)), Blocks(file, 0, N_LAYER, dtype=torch.bfloat16)
        suffix = Suffix(blocks)
        assert suffix.shares
        assert blocks.apart
        assert suffix.reduced == expected.reduced
        assert blocks.fused == expected.blocks.fused
        Head(blocks)


def test_answers_share_their_text(model_path: Path, reference: Any, llama: Any, tmp_path: Path) -> None:
    """Many labels: the rows of a forward pass are the text's once, and the loss and gradients are those of sequences
    run one by one, as they are on a model that does not obey the mask."""
    prompt, end = llama.tokens("Which of these is it? " + "a long and winding story " * 6), 2
    labels = [llama.tokens(f" a kind of {word} thing") for word in ("red", "green", "very blue", "yellow", "dark")]
    encoded = [encode([*prompt, 7 + i], labels, labels[i], end) for i in range(3)]
    path, tap = write_encoded(tmp_path / "encoded.jsonl", encoded), tmp_path / "tap.f32"
    prefix = shared_prefix(encoded)

    first = N_LAYER - 3

    def hidden(tokens: list[int]) -> torch.Tensor:
        states: torch.Tensor = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states[first][0]
        return states

    with torch.no_grad():
        tap.write_bytes(distinct(prefix, encoded, hidden).numpy().tobytes())
    spec = parse_spec(
        {
            "model": str(model_path),
            "first_block": first,
            "end_block": N_LAYER,
            "tap": str(tap),
            "encoded": str(path),
            "train": [0, 1, 2],
            "prefix": prefix,
            "starts": Case(prompt[:prefix], encoded, path).starts,
            "options": {"rank": 4, "micro_tokens": 1000},
            "output": str(tmp_path / "adapter.gguf"),
        }
    )
    learner = make_learner(spec)
    assert isinstance(learner, InMemory)
    (batch,) = learner.micro_batches(spec.examples)
    assert batch.shape == (1, prefix + sum(each.n_distinct - prefix for each in encoded))
    assert batch.shape[1] < sum(map(len, encoded[0].sequences))
    results = []
    for shares, apart in ((True, True), (True, False), (False, False)):
        learner.suffix.shares, learner.blocks.apart = shares, apart
        for layer in learner.lora.values():
            layer.b.data = torch.full_like(layer.b, 0.01)
        loss = learner.gradients(spec.examples)
        gradients = [matrix.grad.clone() for matrix in learner.parameters if matrix.grad is not None]
        for matrix in learner.parameters:
            matrix.grad = None
        results.append((loss, gradients))
    *shared, (plain, theirs) = results
    for loss, gradients in shared:
        assert loss == pytest.approx(plain, rel=1e-4)
        assert len(gradients) == len(learner.parameters)
        assert all((a - b).norm() <= 1e-3 * b.norm() for a, b in zip(gradients, theirs, strict=True))
