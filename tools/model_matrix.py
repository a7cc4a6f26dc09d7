"""What agentd does with each family of tools/shapes, found out on its tiny model: `python -m tools.model_matrix`.

Every line is run, not looked up: the engine serves and taps, torch computes the same blocks, three ways of training
lower the loss on the same rows as the engine itself then measures it. With --write the table goes to docs/models.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agentd.adapt.planning.engine_sample import ANSWERS
from agentd.engine.llamacpp.background import LlamaCppBackground
from agentd.engine.llamacpp.engine import LlamaCppEngine
from agentd.engine.protocol import BASE, Generate, Sampling, TapIndex
from agentd.learn.encoded import Encoded
from agentd.learn.spsa import minimise
from tools import shape_model
from tools.shapes.families import FAMILIES

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- from here on written by tools/model_matrix.py -->", "<!-- up to here -->"

_LETTERS = {"yes": "a", "no": "z"}
_NLL_WEIGHT = 0.1
_OPTIONS = {"rank": 4, "alpha": 8.0, "lr": 1e-2, "batch": 6, "max_epochs": 3, "micro_tokens": 256, "threads": 1}
_ZO_STEPS, _ZO_EPSILON = 12, 0.02
_TRAINED = "trained"


@dataclass
class Losses:
    """Of the same rows before and after training, by the engine; and `agreement`, the cosine between torch's and the
    engine's change of the answers' likelihoods (None where torch is not asked)."""

    before: float
    after: float
    agreement: float | None = None

    @property
    def fell(self) -> bool:
        return self.after < self.before


@dataclass
class Result:
    """`cosines` by block, empty where no block can be built, for `reason`."""

    name: str
    architecture: str
    blocks: int
    answer: str = ""
    cosines: tuple[float, ...] = ()
    reason: str | None = None
    first: int = 0
    losses: dict[str, Losses] = field(default_factory=dict)


class Family:
    """A family's tiny model in the engine, and what it is trained on."""

    def __init__(self, name: str, folder: Path, quantise: str = "F32") -> None:
        self.name, self.folder = name, folder
        self.path = shape_model.write(folder / f"{name}.gguf", name, quantise=quantise)
        self.engine = LlamaCppEngine(self.path, context=512, slots=2, threads=1, gpu_layers=0)
        self.background: LlamaCppBackground = self.engine.background(lambda: False)
        self.n_layer = self.engine.info.n_layer
        self.background.use(BASE)
        self.examples = list(self.make_examples(12))
        self.encoded = folder / "encoded.jsonl"
        self.encoded.write_text("".join(json.dumps(asdict(each)) + "\n" for each in self.examples))

    def __enter__(self) -> "Family":
        return self

    def __exit__(self, *_: object) -> None:
        self.background.close()
        self.engine.close()

    def greedy(self, text: str, n: int = 8) -> str:
        self.engine.submit(Generate("one", {"prompt": text}, Sampling(temperature=0, seed=0), max_tokens=n))
        answer = ""
        while self.engine.busy:
            answer += "".join(piece.text for piece in self.engine.step())
        return answer

    def sample(self) -> Path:
        """As adapt/planning/engine_sample.py writes it."""
        text = "the quick brown fox jumps over it"
        example = self.background.encode({"prompt": text}, ANSWERS, ANSWERS[0])
        tap, path = self.folder / "sample.f32", self.folder / "sample.json"
        index = self.tap([example], range(self.n_layer), tap)
        (scores,) = [each for part in self.background.score([example]) for each in part]
        place = {"tap": str(tap), "prefix": index.prefix_rows, "start": index.starts[0]}
        tree = {"encoded": asdict(example), **place, "choices": scores.choices, "target": scores.target}
        path.write_text(json.dumps(tree))
        return path

    def tap(self, examples: list[Encoded], blocks: range, path: Path) -> TapIndex:
        *_, index = self.background.tap(examples, blocks, path)
        assert isinstance(index, TapIndex)
        return index

    def loss(self) -> float:
        *_, value = self.background.loss(self.examples, _NLL_WEIGHT, 0, 0.0)
        assert value is not None
        return value

    def likelihoods(self) -> list[float]:
        scores = [each for part in self.background.score(self.examples) for each in part]
        return [value for each in scores for value in (*each.choices, *each.target)]

    def use(self, adapter: Path | None) -> None:
        if adapter is not None:
            self.engine.stage(_TRAINED, adapter, None)
        self.background.use(BASE if adapter is None else _TRAINED)

    def train(self, blocks: int, *, asked: bool) -> Losses:
        """The last `blocks` by backpropagation: on states tapped once, or asked for in every step."""
        from agentd.trainer.in_memory import InMemory
        from agentd.trainer.loop import batches_of, make_learner
        from agentd.trainer.spec import parse_spec

        tap, output = self.folder / "tap.f32", self.folder / f"{blocks}-{asked}.gguf"
        states: dict[str, Any] = {"states": "asked"}
        self.use(None)
        before, base = self.loss(), self.likelihoods()
        if not asked:
            index = self.tap(self.examples, range(self.n_layer - blocks, self.n_layer - blocks + 1), tap)
            states = {"states": "tapped", "prefix": index.prefix_rows, "starts": index.starts}
        spec = parse_spec(
            {
                "model": str(self.path),
                "first_block": self.n_layer - blocks,
                "end_block": self.n_layer,
                "tap": str(tap),
                "encoded": str(self.encoded),
                "train": list(range(len(self.examples))),
                "output": str(output),
                "options": {**_OPTIONS, "max_epochs": 2} if asked else _OPTIONS,
                **states,
            }
        )
        learner = make_learner(spec, self._answer)
        for epoch in range(spec.options.max_epochs):
            for part in batches_of(spec.examples, 0, epoch, spec.options.batch):
                learner.step(part, spec.options.lr)
        learner.write(output, durable=False)
        ours = _likelihoods(learner) if isinstance(learner, InMemory) else None
        self.use(output)
        after, changed = self.loss(), self.likelihoods()
        self.use(None)
        return Losses(before, after, None if ours is None else _cosine(base, ours, changed))

    def zeroth_order(self) -> Losses:
        """MeZO on the control vectors."""
        self.use(None)
        before = self.loss()
        for _ in minimise(_Oracle(self), steps=_ZO_STEPS, epsilon=_ZO_EPSILON, probes=4):
            pass
        *_, after = self.background.loss(self.examples, _NLL_WEIGHT, 0, 0.0)
        assert after is not None
        self.use(None)
        return Losses(before, after)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        self.use(Path(request["adapter"]))
        some = [self.examples[number] for number in request["examples"]]
        if request["ask"] == "score":
            return {"scores": [asdict(each) for part in self.background.score(some) for each in part]}
        return asdict(self.tap(some, range(request["first"], request["end"]), Path(request["path"])))

    def make_examples(self, n: int) -> Iterator[Encoded]:
        """Which of two letters a text is made of."""
        for i in range(n):
            label = "yes" if i % 2 else "no"
            yield self.background.encode({"prompt": f"{_LETTERS[label] * (4 + i % 5)} {i}: "}, list(_LETTERS), label)


class _Oracle:
    """The engine's loss as SPSA sees it."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def loss(self, seed: int, scale: float, batch: int) -> float:
        half = self._family.examples[batch % 2 :: 2]
        *_, value = self._family.background.loss(half, _NLL_WEIGHT, seed, scale)
        assert value is not None
        return value

    def update(self, seed: int, coefficient: float) -> None:
        self._family.background.update(seed, coefficient)


def _likelihoods(learner: Any) -> list[float]:
    """What the trained blocks say of the examples' answers, in the engine's order."""
    import torch

    values: list[float] = []
    with torch.no_grad():
        for example in learner.spec.examples:
            (batch,) = learner.batches([example], learner.spec.prefix)
            # the scored rows are computed alone, each once
            rows = list(dict.fromkeys(batch.rows))
            hidden = learner.suffix(learner.tap.inputs(batch), batch.tree, torch.tensor(rows))
            tokens = torch.tensor([term[2] for term in example.terms])
            at = torch.tensor([rows.index(row) for row in batch.rows])
            terms = iter(learner.head.log_likelihoods(hidden, at, tokens).tolist())
            values += [sum(next(terms) for _ in choice) for choice in example.encoded.choices]
            values += terms
    return values


def _cosine(base: list[float], ours: list[float], theirs: list[float]) -> float:
    """Between both changes of the likelihoods."""
    import numpy as np

    a, b = np.array(ours) - base, np.array(theirs) - base
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def run(name: str, folder: Path, quantise: str = "F32") -> Result:
    """Everything, on one family."""
    from agentd.nn.gguf_file import GGUFFile
    from agentd.nn.meta_model import Unsupported
    from agentd.trainer.agreement import compare

    with Family(name, folder, quantise) as family:
        result = Result(name, FAMILIES[name].architecture, family.n_layer, family.greedy("hello, "))
        result.losses["mezo"] = family.zeroth_order()
        try:
            agreement = compare(GGUFFile(family.path), family.sample())
        except Unsupported as unsupported:
            result.reason = unsupported.reason
            return result
        result.cosines, result.first, result.reason = agreement.cosines, agreement.first, agreement.reason
        most = family.n_layer - agreement.first
        if most:
            result.losses["suffix-bp"] = family.train(min(2, most), asked=False)
        if most == family.n_layer:
            result.losses["blockwise-bp"] = family.train(most, asked=True)
        return result


def table(results: list[Result]) -> str:
    """The rows of docs/models.md."""
    lines = [
        "| family | architecture in GGUF | blocks compared with the engine's | trains by | sizes |",
        "|---|---|---|---|---|",
    ]
    for each in results:
        compared = f"{sum(c >= 0.99 for c in each.cosines)} of {each.blocks}" if each.cosines else "none can be built"
        ways = [_WAYS[way] for way in _WAYS if way in each.losses and each.losses[way].fell]
        sizes = ", ".join(size for size in FAMILIES[each.name].sizes)
        lines.append(f"| {each.name} | `{each.architecture}` | {compared} | {', '.join(ways)} | {sizes} |")
    return "\n".join(lines)


_WAYS = {"blockwise-bp": "k = L", "suffix-bp": "suffix", "mezo": "ZO"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="model_matrix", description="Runs every family's tiny model.")
    parser.add_argument("names", nargs="*", help="families (default: all)")
    parser.add_argument("--quantise", default="F32", metavar="TYPE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    options = parser.parse_args(arguments)
    results = []
    for name in options.names or sorted(FAMILIES):
        with tempfile.TemporaryDirectory() as folder:
            results.append(run(name, Path(folder), options.quantise))
        print(name, results[-1].reason or "", file=sys.stderr)
    if options.json:
        print(json.dumps([asdict(each) for each in results], indent=2))
    else:
        print(table(results))
    if options.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
