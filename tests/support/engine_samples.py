"""Engines to test, requests to send them, and adapters made on the spot."""

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from agentd.engine.protocol import Background, Engine, Generate, Piece, Sampling, Scores
from agentd.formats.gguf_header import read_header
from agentd.learn import ledger
from agentd.learn.encoded import Encoded

# As the engine process has it: threads that spin while they wait take the cores from whatever else runs.
os.environ.setdefault("GOMP_SPINCOUNT", "500")

CONTEXT = 512
SLOTS = 4
GREEDY = Sampling(temperature=0, seed=0)  # the seed makes answers the same in any company
CHOICES = ["positive", "negative"]
REVIEWS = [
    ("A warm and funny film that earns every smile.", "positive"),
    ("Dull, loud and far too long.", "negative"),
    ("The cast is splendid and the script has bite.", "positive"),
    ("I wanted my two hours back before the first one was over.", "negative"),
    ("Gorgeous.", "positive"),
    (
        "A tired story told without wit, with a score that never stops telling you what to feel, and an ending that "
        "everybody in the room had guessed by the time the title came up.",
        "negative",
    ),
]


def llamacpp(path: Path) -> Engine:
    from agentd.engine.llamacpp.engine import LlamaCppEngine

    return LlamaCppEngine(path, context=CONTEXT, slots=SLOTS, threads=1)


def transformers(path: Path) -> Engine:
    from agentd.engine.transformers.engine import TransformersEngine

    key = f"{path.stat().st_size:x}-{path.stat().st_mtime_ns:x}"[::-1]
    return TransformersEngine(path, folder=scratch(), key=key, context=CONTEXT, slots=SLOTS, threads=1)


@functools.cache
def scratch() -> Path:
    """A directory that lasts as long as the tests run: the same image of a model's weights serves them all."""
    folder = Path(tempfile.mkdtemp(prefix="agentd-weights-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


ENGINES: dict[str, Callable[[Path], Engine]] = {"llamacpp": llamacpp, "transformers": transformers}
"""Every engine passes the same tests; another one is another line here."""

_OWN: dict[str, set[str]] = {"LlamaCppEngine": {"tap", "control"}, "TransformersEngine": set()}
_WHY = {
    "tap": "hidden states are tapped for the trainer of the llama.cpp engine",
    "control": "control vectors and GGUF adapters are revisions of the llama.cpp engine",
}


def needs(engine: Engine, capability: str) -> None:
    """Skips a test of what is one engine's own by nature."""
    if capability not in _OWN[type(engine).__name__]:
        pytest.skip(_WHY[capability])


def write_revision(engine: Engine, path: Path, model: Path, *, seed: int = 0, size: float = 2.0) -> Path:
    """The file that this engine stages a revision from: a LoRA, or a ledger of a few steps on all weights."""
    if type(engine).__name__ == "LlamaCppEngine":
        return write_lora(path, model, seed=seed, size=size)
    steps = [ledger.Step(100 * seed + i, 1.0, size * 2e-3, 1e-3) for i in range(3)]
    ledger.write(path, ledger.Ledger(0, steps))
    return path


@dataclass
class Answer:
    """Everything that came out of one request."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def last(self) -> Piece:
        return self.pieces[-1]

    @property
    def logprobs(self) -> list[dict[str, Any]]:
        return [entry for piece in self.pieces for entry in piece.logprobs]


class Interruption:
    """Asks for the processor when it is asked for the n-th time, for every n in `at`."""

    def __init__(self) -> None:
        self.polls = 0
        self.at: set[int] = set()

    def __call__(self) -> bool:
        self.polls += 1
        if self.polls in self.at:
            self.at.remove(self.polls)
            return True
        return False


def score(background: Background, examples: list[Encoded]) -> list[Scores]:
    return [scores for some in background.score(examples) for scores in some]


def chat(key: str, text: str, sampling: Sampling = GREEDY, **settings: Any) -> Generate:
    settings = {"max_tokens": 16, **settings}
    return Generate(key, {"messages": [{"role": "user", "content": text}]}, sampling, **settings)


def raw(key: str, text: str, sampling: Sampling = GREEDY, **settings: Any) -> Generate:
    settings = {"max_tokens": 16, **settings}
    return Generate(key, {"prompt": text}, sampling, **settings)


def refusal(engine: Engine, request: Generate) -> str:
    """Why a request is refused whose constraint cannot be obeyed: it ends before anything was said."""
    engine.submit(request)
    answer = finish(engine)[request.key]
    assert [piece.text for piece in answer.pieces] == [""]
    assert answer.last.error is not None
    assert answer.last.error["status"] == 400
    return str(answer.last.error["message"])


def finish(engine: Engine, answers: dict[str, Answer] | None = None) -> dict[str, Answer]:
    """Steps until every request is answered."""
    answers = {} if answers is None else answers
    while engine.busy:
        for piece in engine.step():
            answers.setdefault(piece.key, Answer()).pieces.append(piece)
    return answers


def ask(engine: Engine, *requests: Generate) -> list[Answer]:
    """Sends requests together and returns their whole answers."""
    for request in requests:
        engine.submit(request)
    answers = finish(engine)
    return [answers[request.key] for request in requests]


def last(values: Iterable[Any]) -> Any:
    """What work ends with; before it come Nones, where serving may cut in."""
    *_, final = values
    return final


def review(text: str) -> dict[str, Any]:
    """An input whose beginning is shared by all of them."""
    return {"messages": [{"role": "user", "content": f"Is this movie review positive or negative?\n\n{text}"}]}


def write_lora(
    path: Path,
    model: Path,
    *,
    seed: int = 0,
    size: float = 1.0,
    rank: int = 4,
    architecture: str | None = None,
    transpose: bool = False,
    poison: float | None = None,
    alpha: float | None = None,
) -> Path:
    """A random LoRA on the last block's ffn_down; `size` is the change's scale, `poison` becomes one of its numbers."""
    header = read_header(model)
    down = [tensor for tensor in header.tensors if tensor.name.endswith("ffn_down.weight")]
    last = max(down, key=lambda tensor: int(tensor.name.split(".")[1]))
    n_in, n_out = last.shape[:2]
    random = np.random.default_rng(seed)
    a = (random.standard_normal((rank, n_in)) / n_in**0.5).astype(np.float32)
    b = (size * random.standard_normal((n_out, rank))).astype(np.float32)
    if poison is not None:
        b[3, 1] = poison
    if transpose:
        a, b = b.T.copy(), a.T.copy()
    writer = gguf.GGUFWriter(path, architecture or header.architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha or float(rank))
    writer.add_tensor(f"{last.name}.lora_a", a)
    writer.add_tensor(f"{last.name}.lora_b", b)
    _write(writer)
    return path


def write_control(path: Path, rows: Iterable[tuple[str, "np.typing.NDArray[np.float32]"]]) -> Path:
    """A control vector file with any tensors, right or wrong."""
    writer = gguf.GGUFWriter(path, "controlvector")
    for name, row in rows:
        writer.add_tensor(name, row)
    _write(writer)
    return path


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
