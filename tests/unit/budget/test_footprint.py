import asyncio
import json
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from agentd.adapt.planning.overhead import engine_runtime
from agentd.budget import footprint
from agentd.budget.footprint import daemon_terms, engine_terms, total, trainer_terms
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.plan import PlanSpace
from agentd.budget.workload import Workload
from agentd.engine.process.activity import Activity
from agentd.engine.protocol import Generate
from agentd.formats.gguf_header import read_header
from agentd.learn.encoded import Encoded
from agentd.limits import scored_rows
from tools.bench.parts import supervisor

MIB = 2**20


@pytest.fixture(scope="module")
def arch(real_model: Path) -> ModelShapes:
    return ModelShapes.from_header(read_header(real_model))


def test_shapes_of_the_default_model(arch: ModelShapes) -> None:
    assert (arch.n_layer, arch.n_embd, arch.n_head, arch.n_head_kv, arch.head_dim) == (30, 576, 9, 3, 64)
    assert (arch.n_ff, arch.n_vocab, arch.tied, arch.head_bytes) == (1536, 49152, True, 0)
    # v, o, gate, up, down of 576 -> 192, 576 -> 576 and 576 <-> 1536; q and k are permuted in this file
    assert arch.lora_width == (768 + 1152 + 3 * 2112,) * 30
    attention, feed_forward, norms = 576 * (576 + 2 * 192 + 576), 3 * 576 * 1536, 2 * 576
    assert arch.block_parameters == (attention + feed_forward + norms,) * 30
    # Q4_1: 20 bytes for 32 weights; norms in float32; the embedding in Q8_0: 34 for 32
    assert arch.block_bytes[0] == (attention + feed_forward) * 20 // 32 + norms * 4
    assert arch.embedding_bytes == 576 * 49152 * 34 // 32
    assert arch.kv_bytes_per_token == 2 * 30 * 3 * 64 * 2


def test_terms_grow_with_what_they_depend_on(arch: ModelShapes) -> None:
    small = Workload(seq_len=40, tokens=10_000, examples=300)
    sizes = [total(trainer_terms(arch, replace(small, bf16=True), k)) for k in (1, 30)]
    assert sizes[1] - sizes[0] > 2 * 29 * arch.block_parameters[0]
    by_name = {term.name: term for term in trainer_terms(arch, small, 4)}
    assert by_name["block weights"].bytes == 4 * 4 * arch.block_parameters[0]
    assert by_name["LoRA and AdamW"].bytes == 5 * 4 * 8 * 4 * arch.lora_width[0]
    together, one = (
        {t.name: t.bytes for t in trainer_terms(arch, replace(small, micro_tokens=1000, checkpoint=checkpoint), 8)}
        for checkpoint in (False, True)
    )
    assert one["block weights"] == together["block weights"] / 8 == 4 * arch.block_parameters[0]
    assert one["activations"] < together["activations"]
    # While it taps the logits are not there: only what is more than those counts.
    for length, tap in ((40, 0), (1000, 31 * 1000 * 576 * 4 - 80 * arch.n_vocab * 4)):
        tapped = {t.name: t.bytes for t in engine_terms(arch, replace(small, seq_len=length), 30, tapped=True)}
        assert tapped["tap"] == tap
    for length, context, cells in ((40, 2048, 168), (200, 256, 256), (1500, 2048, 1628), (2000, 2048, 2048)):
        terms = {term.name: term.bytes for term in engine_terms(arch, Workload(length, 1, 1, context=context))}
        assert terms["background KV cache"] == cells * arch.kv_bytes_per_token
    assert total(engine_terms(arch, replace(small, scored=30))) > total(engine_terms(arch, small))
    assert total(daemon_terms(replace(small, examples=600))) > total(daemon_terms(small))


FOUR_BILLION = ModelShapes.dense(
    "4B", n_layer=36, n_embd=2560, n_head=32, n_head_kv=8, n_ff=9728, n_vocab=151936, tied=True, bits=4.5
)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_weights_take_in_the_trainer_does_not_grow_with_the_model(arch: ModelShapes, bf16: bool) -> None:
    """Blocks that are small are made once, of larger ones a part of a matrix at a time; the head likewise."""
    work = Workload(seq_len=256, tokens=25_000, examples=100, bf16=bf16)

    def terms(shapes: ModelShapes, k: int, *, checkpoint: bool = False, tapped: bool = False) -> dict[str, int]:
        terms = trainer_terms(shapes, replace(work, checkpoint=checkpoint), k, tapped=tapped)
        return {term.name: term.bytes for term in terms}

    block = (2 if bf16 else 4) * FOUR_BILLION.block_parameters[0]
    one = terms(FOUR_BILLION, 1)["block weights"]  # in bfloat16 a single block is not too large
    assert one == block if bf16 else one < 12 * MIB
    large = [terms(FOUR_BILLION, 8), terms(FOUR_BILLION, 8, checkpoint=True), terms(FOUR_BILLION, 36, tapped=True)]
    assert all(each["block weights"] < 12 * MIB < block for each in large)
    assert all(each["head, dequantised part"] <= 4.5 * MIB for each in large)
    small = terms(arch, 8, checkpoint=True)
    assert small["block weights"] == (2 if bf16 else 4) * arch.block_parameters[0]


def test_a_large_vocabulary_has_fewer_rows_at_a_time(arch: ModelShapes) -> None:
    assert [scored_rows(n) for n in (300, arch.n_vocab, 151_936, 262_144, 1 << 20)] == [64, 64, 27, 16, 16]
    work = Workload(seq_len=128, tokens=12_800, examples=100, scored=100)
    terms = {term.name: term.bytes for term in engine_terms(FOUR_BILLION, work)}
    assert terms["logits"] == (27 + 40) * 151_936 * 4
    assert terms["compute buffer"] == max(27 * 151_936 * 4, 128 * 4 * (6 * 2560 + 2 * 2560 + 3 * 9728))


def test_engine_and_trainer_take_turns_in_every_step(arch: ModelShapes) -> None:
    """What is not counted twice is what the engine takes for scores alone, or the trainer for a step."""
    for shapes, length in ((arch, 40), (FOUR_BILLION, 40), (arch, 900)):
        plan = PlanSpace(shapes, Workload(length, 100 * length, 100)).plan("blockwise-bp", shapes.n_layer)
        sizes = {(term.process, term.name): term.bytes for term in plan.terms}
        scores = sizes["engine", "logits"] + sizes["engine", "compute buffer"]
        assert 0 < -sizes["together", "taken in turns"] <= scores


def test_products_of_bfloat16_take_more_on_a_processor_with_amx(
    arch: ModelShapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_step(amx: bool, bf16: bool) -> int:
        monkeypatch.setattr(footprint, "has_amx", lambda: amx)
        terms = trainer_terms(arch, Workload(seq_len=40, tokens=10_000, examples=300, bf16=bf16), 4)
        return next(term.bytes for term in terms if term.name == "first step")

    assert first_step(True, False) == first_step(False, False) < first_step(False, True) < first_step(True, True)


def test_a_model_that_is_not_here(arch: ModelShapes) -> None:
    """From its shapes alone the default model is described as by its file, but for the quantised embedding."""
    same = ModelShapes.dense(
        "llama", n_layer=30, n_embd=576, n_head=9, n_head_kv=3, n_ff=1536, n_vocab=49152, tied=True, bits=5
    )
    assert same.block_parameters == arch.block_parameters
    assert same.kv_bytes_per_token == arch.kv_bytes_per_token
    assert sum(same.block_bytes) == pytest.approx(sum(arch.block_bytes), rel=0.01)
    large = ModelShapes.dense("llama", n_layer=32, n_embd=4096, n_head=32, n_head_kv=32, n_ff=11008, n_vocab=32000)
    assert sum(large.block_parameters) + 2 * 32000 * 4096 == pytest.approx(6.738e9, rel=1e-3)


@pytest.mark.parametrize("k", [1, 4])
def test_the_trainer_stays_within_its_prediction(arch: ModelShapes, k: int, real_model: Path, tmp_path: Path) -> None:
    """Measured peak <= prediction <= 1.25 x measured, for the real trainer on one batch of 16.

    What a trainer takes before it has begun is measured on this machine, as the daemon does: new libraries take 70 MiB
    more than old ones.
    """
    generator = random.Random(k)
    prefix, lengths = 30, [generator.randint(20, 60) for _ in range(20)]
    starts = [prefix + sum(lengths[:i]) for i in range(len(lengths))]
    rows = np.random.default_rng(0).standard_normal((prefix + sum(lengths), arch.n_embd), dtype=np.float32)
    rows.tofile(tmp_path / "tap")
    terms = [[(0, prefix + n - 1, token)] for n in lengths for token in (100, 200)]
    encoded = [
        Encoded.of([[1] * (prefix + n)], terms[2 * i : 2 * i + 2], i % 2, terms[2 * i + i % 2])
        for i, n in enumerate(lengths)
    ]
    (tmp_path / "encoded.jsonl").write_text("".join(json.dumps(asdict(each)) + "\n" for each in encoded))
    spec = {
        "model": str(real_model), "first_block": arch.n_layer - k, "end_block": arch.n_layer,
        "tap": str(tmp_path / "tap"), "encoded": str(tmp_path / "encoded.jsonl"), "prefix": prefix, "starts": starts,
        "train": list(range(16)), "dev": list(range(16, 20)),
        "options": {"max_epochs": 1, "threads": 1}, "output": str(tmp_path / "adapter.gguf"),
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    trained, probed = (
        [json.loads(line) for line in subprocess.run(command, capture_output=True, check=True).stdout.splitlines()][-1]
        for command in (
            [sys.executable, "-m", "agentd.trainer", str(tmp_path / "spec.json")],
            [sys.executable, "-m", "agentd.trainer", "--probe", str(real_model)],
        )
    )
    assert trained["event"] == "done", trained
    peak, workload = trained["peak_rss"], Workload(max(lengths), sum(lengths), len(lengths), prefix=prefix, scored=1)
    predicted = total(trainer_terms(arch, workload, k, runtime=probed["runtime_bytes"], start=probed["start_bytes"]))
    assert peak <= predicted <= 1.25 * peak, f"measured {peak / MIB:.0f} MiB, predicted {predicted / MIB:.0f} MiB"


BACKGROUND = """
import os, sys
from pathlib import Path
from agentd.host import allocator
from agentd.adapt.gate.drift_corpus import drift_corpus
from agentd.host.memory import rss
from agentd.engine.llamacpp.engine import LlamaCppEngine
from agentd.engine.protocol import Generate

allocator.few_arenas()
allocator.large_apart()  # both as in the engine's process, without which the same work takes 0 to 5 MiB more by chance
engine = LlamaCppEngine(Path(sys.argv[1]), context=2048, slots=2, threads=2)
engine.submit(Generate("warm", {"prompt": "Once upon a time " * 60}, max_tokens=4))
while engine.busy:
    engine.step()
before = peak = rss(os.getpid())
background = engine.background(lambda: False)
task = "Is this review positive or negative? The plot is thin, number {}, and the actors try hard to save it."
examples = [background.encode({"prompt": task.format(i)}, [" positive", " negative"], " positive") for i in range(24)]
background.use("0")
tap = background.tap(examples, range(29, 30), Path(sys.argv[2]))
drift = background.drift(drift_corpus(), "0", "0")
for part in (background.score(examples), tap, background.loss(examples, 0.1, 1, 0.1), drift):
    for _ in part:
        peak = max(peak, rss(os.getpid()))
print(peak - before, max(e.n_distinct for e in examples))
"""


async def _session_costs(arch: ModelShapes, model: Path, folder: Path) -> int | None:
    engine = supervisor(model, Activity(), context=2048)
    await engine.start()
    try:
        async for _ in engine.generate(Generate("warm", {"prompt": "Once upon a time " * 60}, max_tokens=4)):
            pass
        return await engine_runtime(engine, arch, 2048, folder)
    finally:
        await engine.stop()


@pytest.mark.exclusive
def test_the_engine_stays_within_its_prediction(arch: ModelShapes, real_model: Path, tmp_path: Path) -> None:
    """What background work adds to a serving engine. Of the sum of both processes it is the small part.

    Pages that other processes share count in full, or it would depend on who else has the model open; and what a
    session costs besides its work is measured on this machine, as the daemon does.
    """
    command = [sys.executable, "-c", BACKGROUND, str(real_model), str(tmp_path / "tap")]
    added, longest = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    runtime = asyncio.run(_session_costs(arch, real_model, tmp_path))
    predicted = total(engine_terms(arch, Workload(longest, 24 * longest, 24), runtime=runtime))
    figures = f"measured {added / MIB:.0f} MiB, predicted {predicted / MIB:.0f} MiB"
    assert added <= predicted <= 1.25 * added, figures
