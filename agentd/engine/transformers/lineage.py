"""From a revision's ledger to its weights: base + the ledgers of its chain, each step replayed bit for bit.

Beside a ledger lies a manifest.json that says how its steps move the weights (`update`), in which type (`dtype`), and
the sha256 that they lead to (`weights_sha256`). What backpropagation has moved lies there too, with its values (as many
as `tensors` says): the steps leave these alone. Or low-rank adapters lie there (of these `ranks`), which are added to
the weights, one after the other. What was imported from another device may have both, in the order of its `segments`.
Its parent's ledger lies in the directory of revisions. What was replayed once is kept as a file that is named by its
sha256, so that the next start maps it instead of replaying; such a file can be deleted at any time.
"""

import json
import mmap
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agentd.durable import publish
from agentd.engine.protocol import Weights as Name
from agentd.engine.transformers import image as images
from agentd.engine.transformers.image import Image
from agentd.engine.transformers.learning import from_peft
from agentd.engine.transformers.model import Model, Weights
from agentd.errors import AgentdError, Conflict, RevisionCorrupt
from agentd.learn import ledger
from agentd.learn.ledger import Step
from agentd.nn import lora
from agentd.nn.linear_layer import layer_of
from agentd.nn.mezo import InPlace
from agentd.revision import chain
from agentd.revision.chain import Segment
from agentd.revision.files import LEDGER, LORA, MANIFEST, TENSORS

_SPARE_IMAGES = 2  # images beside those that are staged: what serves now may soon be gone back to


@dataclass(frozen=True)
class Link:
    """One revision on its parent's weights: its segments, and the steps of all of them in order. `folder` has the
    adapters' factors, and values for a number of `tensors`."""

    parent: int
    steps: tuple[Step, ...]
    segments: tuple[Segment, ...]
    digest: str | None
    dtype: str | None
    tensors: int
    folder: Path

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those of all its adapters."""
        return tuple(rank for segment in self.segments for rank in segment.ranks)


class Lineage:
    """`revisions` is the directory of revisions, `folder` that of images. Building yields after every
    step, so that serving may cut in."""

    def __init__(self, model: Model, revisions: Path | None, folder: Path) -> None:
        self._model, self._revisions, self._folder = model, revisions, folder
        for left_over in folder.glob(".*.tmp"):
            left_over.unlink(missing_ok=True)

    def build(self, name: Name, path: Path) -> Generator[None, None, Weights]:
        """Returns the weights of the revision whose ledger is `path`; yields while it works.

        Raises RevisionCorrupt where anything is damaged or leads elsewhere than the manifest says.
        """
        links = self._links(name, path)
        image, start = self._model.base.image, 0
        for number in range(len(links), 0, -1):  # the nearest ancestor that is there already
            there = yield from self._intact(links[number - 1].digest)
            if there is not None:
                image, start = there, number
                break
        for link in links[start:]:
            image = yield from self._replayed(name, link, image)
        return Weights(image, self._model.device)

    def verify(self, name: Name, path: Path) -> Generator[None, None, str]:
        """Replays everything from the base anew and returns the sha256 of the weights."""
        image = self._model.base.image
        for link in self._links(name, path):
            image = yield from self._replayed(name, link, image, check=False)
        return (yield from image.open().digesting())

    def adapters(self, name: Name, path: Path, *, alone: bool) -> list[tuple[dict[str, torch.Tensor], tuple[int, ...]]]:
        """The low-rank adapters of a chain from the base on, with their ranks.

        Raises RevisionCorrupt, and Conflict where they are to be `alone` and something else has moved the weights.
        """
        adapters = []
        for link in self._links(name, path):
            if alone and (link.steps or link.tensors):
                raise Conflict("its chain is not of low-rank adapters alone: steps have moved the weights themselves")
            if link.ranks:
                try:
                    adapters.append((images.read([link.folder / LORA]).open().tensors, link.ranks))
                except AgentdError as error:
                    raise RevisionCorrupt(name, str(error)) from None
        return adapters

    def prune(self, used: set[Path]) -> None:
        """Deletes images that nothing uses, but for the newest."""
        unused = [path for path in self._folder.glob("weights-*.safetensors") if path not in used]
        unused.sort(key=lambda path: path.stat().st_mtime)
        for path in unused[: -_SPARE_IMAGES or None]:
            path.unlink(missing_ok=True)

    def _links(self, name: Name, path: Path) -> list[Link]:
        """From the first revision to this one."""
        links = [_read(name, path)]
        while links[0].parent:
            if self._revisions is None or len(links) > 10_000:
                raise RevisionCorrupt(name, f"its parent, revision {links[0].parent}, is not known here")
            links.insert(0, _read(name, self._revisions / str(links[0].parent) / LEDGER))
        own = str(self._model.dtype).partition(".")[2]
        for link in links:
            if link.dtype not in (None, own):
                raise RevisionCorrupt(
                    name, f"it was learned in {link.dtype}, and the model is served in {own} (model.dtype)"
                )
        return links

    def _intact(self, digest: str | None) -> Generator[None, None, Image | None]:
        """Returns the image with this sha256 if there is one and it is what it says."""
        if digest is None or not (path := self._path(digest)).exists():
            return None
        shapes = {part.name: part.shape for part in self._model.base.image.parts}
        image = images.arranged(images.read([path]), shapes, self._model.dtype)
        if image is not None:
            actual = yield from image.open().digesting()
            if actual == digest:
                path.touch()  # prune goes by age
                return image
        path.unlink(missing_ok=True)
        return None

    def _replayed(self, name: Name, link: Link, parent: Image, *, check: bool = True) -> Generator[None, None, Image]:
        """Returns the image that a link leads to from its parent's."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._folder / f".{name}.tmp"
        model = self._model
        try:
            yield from images.copy(parent.open(), temporary)
            shapes = {part.name: part.shape for part in parent.parts}
            copy = images.arranged(images.read([temporary]), shapes, model.dtype)
            assert copy is not None
            target = _WritableWeights(copy, model.device)
            try:
                model.install(target)
                stored = self._stored(name, link, shapes)
                steps, ranks = 0, 0
                for segment in link.segments:
                    if segment.steps and not shapes.keys() <= stored.keys():
                        model.install(target)  # thresholds come from these weights
                        theta = InPlace(
                            model.module, parameters=lambda each: each not in stored, **segment.rule.as_json()
                        )
                        for step in link.steps[steps : steps + segment.steps]:
                            model.install(target)
                            theta.replay([step])
                            yield
                    yield from self._merged(name, link, target, ranks, ranks + len(segment.ranks))
                    steps, ranks = steps + segment.steps, ranks + len(segment.ranks)
                target.finish()
                for part_name, values in stored.items():
                    target.mapped.tensors[part_name].copy_(values)
                    yield
                if not all(bool(torch.isfinite(tensor).all()) for tensor in target.mapped.tensors.values()):
                    raise RevisionCorrupt(name, "its steps lead to weights that are not finite")
                digest = yield from target.mapped.digesting()
            finally:
                model.uninstall(target)
            if check and link.digest not in (None, digest):
                raise RevisionCorrupt(name, f"replaying its ledger gives weights {digest}, not {link.digest}")
            publish(temporary, self._path(digest))
        except ValueError as error:
            raise RevisionCorrupt(name, str(error)) from None
        finally:
            temporary.unlink(missing_ok=True)
        image = images.arranged(images.read([self._path(digest)]), shapes, model.dtype)
        assert image is not None
        return image

    def _stored(self, name: Name, link: Link, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """The values that a link has of its own. Raises RevisionCorrupt."""
        if not link.tensors:
            return {}
        file = link.folder / TENSORS
        try:
            stored = images.read([file])
        except AgentdError as error:
            raise RevisionCorrupt(name, str(error)) from None
        own = {part.name: shapes[part.name] for part in stored.parts if part.name in shapes}
        image = images.arranged(stored, own, self._model.dtype)
        if image is None or not len(own) == len(stored.parts) == link.tensors:
            raise RevisionCorrupt(name, f"{file.name} does not hold {link.tensors} of this model's tensors")
        return image.open().tensors

    def _merged(self, name: Name, link: Link, target: Weights, first: int, end: int) -> Iterator[None]:
        """Adds adapters `first` to `end` - 1 of a link to the weights, layer by layer. Raises RevisionCorrupt."""
        if first == end:
            return
        numbers = {each: number for number, (each, _) in enumerate(self._model.module.named_parameters())}
        try:
            factors = images.read([link.folder / LORA]).open().tensors
            modules = dict(self._model.module.named_modules())
            for where, adapters in from_peft(factors, link.ranks):
                weight = f"{where}.weight"
                layer = layer_of(modules[where]) if where in modules and weight in numbers else None
                if layer is None:
                    raise ValueError(f"{LORA} has adapters of {where}, which this model has not")
                for pair in adapters[first:end]:
                    a, b = layer.as_stored(*(factor.to(self._model.device) for factor in pair))
                    lora.merge(target.tensors[weight], a, b, numbers[weight])
                    yield
        except (AgentdError, ValueError) as error:
            raise RevisionCorrupt(name, str(error)) from None

    def _path(self, digest: str) -> Path:
        return self._folder / f"weights-{digest}.safetensors"


class _WritableWeights(Weights):
    """Weights that are written to their file: directly on the CPU, at the end on a GPU."""

    def __init__(self, image: Image, device: torch.device) -> None:
        super().__init__(image, device)
        self._mapped = image.open(mmap.ACCESS_WRITE)

    def finish(self) -> None:
        for name, tensor in self.mapped.tensors.items():
            if tensor is not self.tensors[name]:
                tensor.copy_(self.tensors[name])

    def release(self) -> None:
        """Its pages are on their way to the file."""


def _read(name: Name, path: Path) -> Link:
    try:
        steps = ledger.read(path)
        manifest: dict[str, Any] = {}
        description = path.parent / MANIFEST
        if description.exists():
            manifest = json.loads(description.read_text(encoding="utf-8"))
        tensors = int(manifest.get("tensors") or 0)
        digest, dtype = manifest.get("weights_sha256"), manifest.get("dtype")
        segments = chain.of_manifest(manifest, len(steps.steps))
        return Link(steps.parent, tuple(steps.steps), segments, digest, dtype, tensors, path.parent)
    except OSError as error:
        raise RevisionCorrupt(name, f"{path.name} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise RevisionCorrupt(name, str(error)) from None
