"""The gradient that a pass trains with, block by block, against full autograd on the dequantised model.

    python -m tools.bench gradient MODEL.gguf [--examples 16] [--json FILE] [--plot FILE.png]

Block-wise BP takes every block's input from the quantised engine, whose activations are rounded to 8 bits, and computes
each block again by itself. Here it does so for one batch of reviews, driven as a pass drives it, with random LoRA
matrices in every block; the same matrices are put on transformers' own model in float32, which runs from the tokens to
the loss and back. A row is the cosine of the two gradients over all LoRA matrices of a block, in float32 and with
products in bfloat16. Models whose blocks are named as Llama's.
"""

import argparse
import asyncio
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from agentd.adapt.passes.trainer_job import NLL_WEIGHT, Backpropagation
from agentd.adapt.passes.trainer_process import Answer, Training
from agentd.adapt.planning.setting import Setting
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.plan import PlanSpace
from agentd.budget.planner import Choice
from agentd.budget.workload import Workload
from agentd.engine.operations import Encode, Open, Use
from agentd.engine.process.activity import Activity
from agentd.formats.gguf_header import read_header
from agentd.learn.encoded import Encoded
from agentd.learn.objectives import objective
from agentd.methods import BLOCKWISE
from agentd.trainer.blockwise import Blockwise
from agentd.trainer.loop import make_learner
from agentd.trainer.spec import parse_spec
from tools.bench.elastic_tasks import reviews
from tools.bench.paper.methods_model import load
from tools.bench.parts import THREADS, member, supervisor

RANK = 8
SIZE_OF_B = 0.02  # LoRA's B is zero at first, and then A has no gradient
PLACES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Once(Training):
    """Takes the place of the trainer's process: one gradient, no step."""

    def __init__(self, activity: Activity, log: Path) -> None:
        super().__init__(activity, log)
        self.gradients: dict[str, Matrices] = {}
        self.matrices: Matrices = {}
        self.scale = 1.0

    async def run(
        self,
        spec: dict[str, Any],
        path: Path,
        on_event: Callable[[dict[str, Any]], None],
        answer: Answer | None = None,
        limit: int | None = None,
    ) -> dict[str, Any]:
        assert answer is not None
        loop, own = asyncio.get_running_loop(), answer

        async def answered(request: dict[str, Any]) -> dict[str, Any]:
            return await own(request)

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            return asyncio.run_coroutine_threadsafe(answered(request), loop).result()

        for name, bf16 in (("float32", False), ("bfloat16", True)):
            own_spec = {**spec, "options": {**spec["options"], "bf16": bf16}}
            await asyncio.to_thread(self._gradient, name, own_spec, ask)
        return {}

    def _gradient(self, name: str, spec: dict[str, Any], ask: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        torch.set_num_threads(THREADS)
        learner = make_learner(parse_spec(spec), ask)
        assert isinstance(learner, Blockwise)
        generator = torch.Generator().manual_seed(1)
        for layer in learner.lora.values():
            layer.b.data = SIZE_OF_B * torch.randn(layer.b.shape, generator=generator)
            self.scale = layer.scale
        examples = learner.spec.examples
        gradients: Matrices = {}

        def keep(block: int) -> None:
            for tensor, layer in learner.lora.items():
                if tensor.startswith(f"blk.{block}."):
                    assert layer.a.grad is not None
                    assert layer.b.grad is not None
                    gradients[tensor] = layer.a.grad.clone(), layer.b.grad.clone()

        learner.backward(learner.checkpoints(examples), 1 / len(examples), keep)
        self.gradients[name] = gradients
        self.matrices = {tensor: (layer.a.detach(), layer.b.detach()) for tensor, layer in learner.lora.items()}


async def blockwise(model: Path, n: int, folder: Path) -> tuple[Once, dict[int, Encoded]]:
    """The gradients as a pass computes them, and the examples as the engine encoded them."""
    task, header = reviews("tune"), read_header(model)
    activity = Activity()
    engine, once = supervisor(model, activity), Once(activity, folder / "trainer.log")
    await engine.start()
    try:
        source, target = folder / "examples.jsonl", folder / "tokens.jsonl"
        source.write_text("".join(json.dumps(example) + "\n" for example in task.examples()[:n]))
        await engine.call(Open())
        await engine.call(Encode(source, target))
        encoded = {i: Encoded.from_json(json.loads(line)) for i, line in enumerate(target.read_text().splitlines())}
        await engine.call(Use("0"))
        members = []
        for i in range(n):
            prompt, right = task.train[i]
            members.append(member(i, "train", task.name, list(task.answers), {"prompt": prompt}, task.answers[right]))
        dial = PlanSpace(ModelShapes.from_header(header), Workload.estimated([prompt for prompt, _ in task.train[:n]]))
        plan = dial.plan(BLOCKWISE, header.block_count)
        setting = Setting(plan.method, plan.blocks, 0, RANK, Choice(plan, 0, 0, 0, ()))
        learning = Backpropagation(
            engine,
            once,
            model=model,
            folder=folder,
            setting=setting,
            members=members,
            encoded=encoded,
            file=target,
            options=setting.train_options(0, THREADS, NLL_WEIGHT, len(members)),
        )
        index = await learning.tap(lambda _: None)
        await learning.train(index, None, None, folder / "adapter.gguf", lambda _: None)
    finally:
        await engine.stop()
    return once, encoded


def autograd(model: Path, once: Once, encoded: dict[int, Encoded]) -> Matrices:
    """The same gradient by torch through transformers' own model, one sequence at a time."""
    whole = load(model, "fp32").requires_grad_(False)
    trained: Matrices = {}
    for tensor, pair in once.matrices.items():
        _, block, name, _ = tensor.split(".")
        a, b = (matrix.clone().requires_grad_() for matrix in pair)

        def add(_: Any, x: Any, y: torch.Tensor, a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            update: torch.Tensor = once.scale * (x[0] @ a.T) @ b.T
            return y + update

        whole.model.layers[int(block)].get_submodule(PLACES[name]).register_forward_hook(add)
        trained[tensor] = a, b
    for example in encoded.values():
        logs = [whole(torch.tensor([sequence])).logits[0].log_softmax(-1) for sequence in example.sequences]
        terms = [*example.choices, example.target]
        parts = [torch.stack([logs[s][p, token] for s, p, token in part]) for part in terms]
        *choices, target = [part.tolist() for part in parts]
        result = objective(choices, example.correct, target, NLL_WEIGHT)
        output_gradients = [torch.tensor(part) / len(encoded) for part in (*result.choices, result.target)]
        torch.autograd.backward(parts, output_gradients)
    gradients = {}
    for tensor, (a, b) in trained.items():
        assert a.grad is not None
        assert b.grad is not None
        gradients[tensor] = a.grad, b.grad
    return gradients


def cosines(ours: Matrices, theirs: Matrices) -> dict[int, float]:
    """By block."""
    sums: dict[int, list[float]] = {}
    for tensor, pair in ours.items():
        part = sums.setdefault(int(tensor.split(".")[1]), [0.0, 0.0, 0.0])
        for mine, other in zip(pair, theirs[tensor], strict=True):
            for i, (x, y) in enumerate(((mine, other), (mine, mine), (other, other))):
                part[i] += float((x.double() * y.double()).sum())
    return {block: dot / math.sqrt(mine * other) for block, (dot, mine, other) in sorted(sums.items())}


def plot(curves: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, by_block in curves.items():
        axes.plot(list(by_block), list(by_block.values()), marker="o", markersize=3, label=name)
    axes.axhline(0.99, color="0.6", linestyle=":", linewidth=1)
    axes.set(xlabel="block", ylabel="cosine to full autograd")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench gradient", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--examples", type=int, default=16, metavar="N", help="reviews in the batch (16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the cosines there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them; PNG or SVG by its name")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        once, encoded = asyncio.run(blockwise(options.model, options.examples, Path(folder)))
    theirs = autograd(options.model, once, encoded)
    curves = {name: cosines(ours, theirs) for name, ours in once.gradients.items()}
    print("| block | " + " | ".join(curves) + " |\n|--:|" + "--:|" * len(curves))
    for block in curves["float32"]:
        print(f"| {block} | " + " | ".join(f"{by_block[block]:.4f}" for by_block in curves.values()) + " |")
    for name, by_block in curves.items():
        print(f"{name}: smallest {min(by_block.values()):.4f}, mean {math.fsum(by_block.values()) / len(by_block):.4f}")
    if options.json:
        options.json.write_text(json.dumps(curves, indent=1))
    if options.plot:
        plot(curves, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
