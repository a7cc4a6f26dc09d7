"""Any causal language model of transformers: it says what transformers' own `generate` makes of it, and it learns.

One of each kind that differs in what an engine could get wrong: positions, masks, caches, layers and heads.
"""

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from agentd.engine.protocol import BASE, AdapterSpec, LearningRule, Sampling
from agentd.engine.transformers.engine import TransformersEngine
from agentd.errors import ModelUnusable
from agentd.learn import ledger
from agentd.learn.ledger import Step
from tests.support.engine_samples import CHOICES, REVIEWS, ask, chat, last, review
from tools import tiny_model

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 1024}
_WINDOW = {"head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
SIZES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},  # positions as a bias of attention
    "falcon": {name: size for name, size in _LLAMA.items() if "key_value" not in name},  # layers of a class of its own
    "gemma3_text": _LLAMA | _WINDOW,  # windows, scaled embeddings, norms of queries and keys
    "gpt2": _GPT2,  # matrices transposed, learned positions
    "gpt_neox": _LLAMA,  # a head that is not tied and has another name
    "gpt_oss": _LLAMA | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},  # sinks, experts in one tensor
    "lfm2": _LLAMA | {"full_attn_idxs": [1, 3]},  # convolutions between the attention layers: no prefix can be kept
    "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 4},  # a configuration with other names
    "qwen3": _LLAMA | {"head_dim": 16},
}
REUSE = set(SIZES) - {"lfm2"}
JOINT = REUSE - {"bloom", "falcon", "mpt"}  # these attend in a way of their own
_RECURRENT = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
SENTENCE = "The sea, the wind and a lighthouse that has not been lit for many years. "


@functools.cache
def tokenizer() -> Any:
    """One whose tokens are bytes."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model.write(Path(folder, "tiny.gguf"))
        return transformers.AutoTokenizer.from_pretrained(folder, gguf_file="tiny.gguf")


def checkpoint(kind: str, folder: Path) -> Path:
    """A directory with a model of this kind, and random weights."""
    config = transformers.CONFIG_MAPPING[kind](
        **SIZES.get(kind, _RECURRENT), vocab_size=len(tokenizer()), bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(str(folder / kind))
    tokenizer().save_pretrained(str(folder / kind))
    return folder / kind


@pytest.fixture(scope="module", params=sorted(SIZES))
def shared_engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TransformersEngine]:
    folder = tmp_path_factory.mktemp(request.param)
    path = checkpoint(request.param, folder)
    engine = TransformersEngine(path, folder=folder / "w", key="0" * 20, context=512, slots=2, dtype="float32")
    yield engine
    engine.close()


def test_an_answer_is_what_generate_makes(engine: TransformersEngine) -> None:
    model: Any = engine.model.module
    for question in (4 * SENTENCE + "Who?", 4 * SENTENCE + "When was it?"):  # the second finds the first in its cache
        answer = ask(engine, chat("q", question, max_tokens=12))[0]
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = prompt["input_ids"]
        whole = model.generate(ids, max_new_tokens=12, do_sample=False)
        assert answer.text == tokenizer().decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert (answer.last.cached_tokens > 0) == (engine.model.config.model_type in REUSE)


def test_several_at_once_say_what_each_says_alone(engine: TransformersEngine) -> None:
    """Prompts longer than a window, of different lengths, computed anew and continued."""
    free = Sampling(temperature=0)
    questions = [4 * SENTENCE + "Who?", "When?"]
    rounds = [
        [chat(f"{i}", question, free, max_tokens=n, logprobs=0) for i, question in enumerate(questions)]
        for n in (10, 14)
    ]
    alone = [[ask(engine, request)[0] for request in requests] for requests in rounds]
    engine.forget(None)
    for requests, expected in zip(rounds, alone, strict=True):
        for answer, other in zip(ask(engine, *requests), expected, strict=True):
            assert answer.text == other.text
            for one, two in zip(answer.logprobs, other.logprobs, strict=True):
                assert one["logprob"] == pytest.approx(two["logprob"], abs=1e-3)
    assert engine._context.joins == (engine.model.config.model_type in JOINT)  # type: ignore[attr-defined]


def test_every_weight_learns_and_a_ledger_leads_back_to_it(engine: TransformersEngine, tmp_path: Path) -> None:
    background = engine.background(lambda: False)
    examples = [background.encode(review(text), CHOICES, label) for text, label in REVIEWS]
    steps = [Step(seed, 1.0, 1e-3, 1e-3) for seed in range(2)]
    for step in steps:
        plus, minus = last(background.pair(examples, 0.1, step.seed, 1e-2))
        assert plus != minus
        background.update(step.seed, step.coefficient)
    reached = background.digest()
    ledger.write(tmp_path / "ledger", ledger.Ledger(0, steps))
    engine.stage("candidate", tmp_path / "ledger", None)
    background.use("candidate")
    assert background.digest() == reached
    background.close()


def test_lora_learns_beside_every_layer_and_is_merged(engine: TransformersEngine, tmp_path: Path) -> None:
    background = engine.background(lambda: False)
    examples = [background.encode(review(text), CHOICES, label) for text, label in REVIEWS]
    before = last(background.loss(examples, 0.1, 0, 0.0))
    background.rule(LearningRule(adapters=AdapterSpec("lora", 4, 8.0, 1, differentiated=True)))
    for seed in range(4):
        last(background.descend(examples, 0.1, seed, 0.0, 3e-3))
    learned = last(background.loss(examples, 0.1, 0, 0.0))
    assert learned < before
    background.write_moved(tmp_path / "lora.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps({"ranks": [4]}))
    ledger.write(tmp_path / "ledger", ledger.Ledger(0, []))
    engine.stage("candidate", tmp_path / "ledger", None)
    background.use("candidate")
    assert last(background.loss(examples, 0.1, 0, 0.0)) == pytest.approx(learned, rel=1e-3)
    background.use(BASE)
    assert last(background.loss(examples, 0.1, 0, 0.0)) == before
    background.close()


def test_a_model_that_keeps_no_keys_and_values_is_refused(tmp_path: Path) -> None:
    path = checkpoint("mamba", tmp_path)
    with pytest.raises(ModelUnusable, match="no keys and values"):
        TransformersEngine(path, folder=tmp_path / "w", key="0" * 20, context=512, slots=2, dtype="float32")
