"""Where a training is, in a file that outlives this process and the machine's next start.

It has all that the steps to come depend on: the matrices, the moments of their gradients, the place in the data, how
large steps are, what dev has said, and the best adapter so far. What goes on from it ends with the same bits as what
was never interrupted, where threads are as many as before.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from agentd import __version__, durable
from agentd.formats.training_state import StateSection, TrainingState, part_of_file, write
from agentd.trainer.learner import Learner
from agentd.trainer.spec import Spec

logger = logging.getLogger(__name__)

_SHARE = 50  # times as long as the last writing took lie between two, so that a slow card costs 2 % of the time at most
_SPARE = 64 << 20  # bytes that it leaves on the disk
_ROUNDING = ("threads", "micro_tokens", "checkpoint", "streamed")  # options that change the order of sums alone
_OTHER = ("seconds", "park_every")  # options that no step depends on, but for how many there are


class Parking:
    """`best` is the file of the best adapter, which need not be there."""

    def __init__(self, spec: Spec, learner: Learner, best: Path, clock: Callable[[], float] = time.monotonic) -> None:
        assert spec.parking is not None
        self._spec, self._learner, self._best, self._clock = spec, learner, best, clock
        self._path = spec.parking
        self._adapter = spec.output.with_name(f"kept-{spec.output.name}")
        self._belongs = belongs(spec)
        self._next = clock()

    @property
    def due(self) -> bool:
        return self._clock() >= self._next

    def save(self, place: dict[str, Any]) -> None:
        """Writes the state behind a step, and what the loop says of its place. Raises OSError, and leaves what there
        was before."""
        began = self._clock()
        self._next = began + self._spec.options.park_every
        self._learner.write(self._adapter, durable=False)
        sections = [part_of_file("adapter", self._adapter)]
        if self._best.exists():
            sections.append(part_of_file("best", self._best))
        sections += [StateSection(name, tensor.nbytes, [_bytes(tensor)]) for name, tensor in self._tensors().items()]
        free, size = shutil.disk_usage(self._path.parent).free, sum(section.size for section in sections)
        if free < size + _SPARE:
            raise OSError(f"{size / 1e6:.0f} MB are to be written, and {free / 1e6:.0f} MB are free")
        steps = self._learner.optimizers[0].steps
        write(self._path, {"belongs": self._belongs, "place": {**place, "adam": steps}, **self._spec.context}, sections)
        self._next = max(self._next, self._clock() + _SHARE * (self._clock() - began))

    def restore(self) -> dict[str, Any]:
        """Puts the learner where the file says, and returns what `save` was given. Raises ValueError with the reason
        where that is not possible; then nothing was changed."""
        try:
            state = TrainingState.read(self._path)
        except OSError as error:
            raise ValueError(f"{self._path.name}: {error.strerror or error}") from None
        theirs = state.header["belongs"]
        if other := sorted(name for name, value in self._belongs.items() if theirs.get(name) != value):
            raise ValueError(f"it belongs to another training: {', '.join(other)}")
        tensors = self._tensors()
        if {name: tensor.nbytes for name, tensor in tensors.items()} != {
            name: size for name, (_, size) in state.places.items() if name not in ("adapter", "best")
        }:
            raise ValueError("it has matrices of other shapes")
        state.extract("adapter", self._adapter)
        self._best.unlink(missing_ok=True)  # may be of a step that comes after this place
        if "best" in state.places:
            state.extract("best", self._best)
        self._learner.read(self._adapter)
        for name, tensor in tensors.items():
            state.read_into(name, _bytes(tensor))
        torch.set_rng_state(tensors["random"])
        place: dict[str, Any] = state.header["place"]
        for optimizer in self._learner.optimizers:
            optimizer.steps = place["adam"]
        self._next = self._clock() + self._spec.options.park_every
        return place

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The learner's own, which may be written into."""
        return {**dict(self._learner.moments), "random": torch.get_rng_state()}


def belongs(spec: Spec) -> dict[str, str]:
    """What has to be the same for steps to go on from a state, by what it is called; files by what they hold."""
    options = {name: value for name, value in asdict(spec.options).items() if name not in (*_ROUNDING, *_OTHER)}
    examples = hashlib.sha256()
    for example in spec.examples:
        examples.update(json.dumps([example.number, example.dev, asdict(example.encoded)]).encode())
    examples.update(json.dumps(spec.groups).encode())
    return {
        "version": __version__,
        "plan": json.dumps([spec.first_block, spec.end_block, options], sort_keys=True),
        "examples": examples.hexdigest(),
        "model and examples": spec.identity,
        "adapter it began with": "" if spec.initial is None else durable.sha256(spec.initial),
        "control vector": "" if spec.control is None else durable.sha256(spec.control),
    }


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Its own memory."""
    return tensor.numpy().data.cast("B")
