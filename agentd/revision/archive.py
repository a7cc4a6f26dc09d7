"""What was learned as one file that another device with the same base takes in.

A tar. `adaptation.json` says which engine learned it on which base (sha256), how, and the sha256 of every other file:

transformers  `ledger` has every step from the base to the revision, in order (learn/ledger.py), some kilobytes;
              `tensors.safetensors` the last values of what backpropagation moved anywhere in the chain, and
              `lora.safetensors` the factors of all its low-rank adapters side by side. `segments` says in which order
              steps and adapters follow one another, `weights_sha256` to which weights: the same there, bit for bit.
llamacpp      `adapter.gguf` and `control.gguf`, or one of them, which hold all that was learned.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar

from agentd import durable
from agentd.errors import Conflict, InvalidRequest, RevisionCorrupt
from agentd.formats import safetensors_file, tar
from agentd.learn import ledger
from agentd.learn.ledger import Step
from agentd.learn.update_rule import UpdateRule
from agentd.revision import chain
from agentd.revision.chain import Segment
from agentd.revision.files import ADAPTER, CONTROL, LEDGER, LORA, TENSORS, RevisionFiles

FORMAT, VERSION = "agentd-adaptation", 1
_DESCRIPTION = "adaptation.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Archive:
    """`origin` is the revision's number where it was made, for the reader alone; `files` are those that were read, by
    name; `source` is the fleet and round that it is of, if it is of one."""

    engine: ClassVar[str]

    base_sha256: str
    method: str
    blocks: int
    origin: int
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False, kw_only=True)
    source: str | None = field(default=None, kw_only=True)

    @property
    def identity(self) -> str:
        """sha256 of what was learned."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """What is said of it beside its files."""
        names = ("base_sha256", "method", "blocks", "origin")
        return {name: getattr(self, name) for name in names} | {
            "format": FORMAT,
            "version": VERSION,
            "engine": self.engine,
        }

    def write(self, out: IO[bytes], files: Mapping[str, Path]) -> None:
        """Writes the archive with `files`. Equal ones give equal bytes."""
        sums = {name: durable.sha256(path) for name, path in files.items()}
        text = json.dumps({**self.described(), "files": sums}, indent=2, sort_keys=True).encode() + b"\n"
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            tar.add(archive, _DESCRIPTION, len(text), io.BytesIO(text))
            for name in sorted(files):
                with files[name].open("rb") as file:
                    tar.add(archive, name, files[name].stat().st_size, file)


@dataclass(frozen=True)
class WeightsArchive(Archive):
    """Of engine transformers. `update` is how the last steps move the weights, as a manifest has it; `moved` names what
    backpropagation moved, in up to `blocks` last blocks; `segments` are the way from the base."""

    engine: ClassVar[str] = "transformers"

    dtype: str
    update: dict[str, Any]
    weights_sha256: str
    steps: list[Step] = field(repr=False)
    segments: tuple[Segment, ...]
    moved: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        return self.weights_sha256

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those of all low-rank adapters."""
        return tuple(rank for segment in self.segments for rank in segment.ranks)

    def described(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("dtype", "update", "weights_sha256")}
        return {**super().described(), **own, "segments": [segment.as_json() for segment in self.segments]}


@dataclass(frozen=True)
class AdapterArchive(Archive):
    """Of engine llama.cpp."""

    engine: ClassVar[str] = "llamacpp"

    @property
    def identity(self) -> str:
        return hashlib.sha256(b"".join(self.files[name] for name in sorted(self.files))).hexdigest()


def gather(files: RevisionFiles, line: Sequence[int], base_sha256: str) -> WeightsArchive:
    """What leads from the base to the newest of `line`, which goes from there to the base.

    Raises RevisionCorrupt, Conflict where a revision is not what engine transformers makes.

    What backpropagation has moved anywhere in the chain is in `moved`: its last value is all that counts, and
    what moves the others depends on nothing but themselves, so all segments may be gone on them one after the other.
    """
    steps: list[Step] = []
    moved: dict[str, None] = {}
    blocks = 0
    way: list[Segment] = []
    last: dict[str, Any] = {}
    for revision in reversed([number for number in line if number]):
        paths = files.verified(revision)
        manifest = files.manifest(revision) or {}
        if LEDGER not in paths or set(paths) - {LEDGER, TENSORS, LORA} or not manifest.get("weights_sha256"):
            raise Conflict(f"revision {revision} is no ledger of steps on the weights; --format says what it can be")
        try:
            own = ledger.read(paths[LEDGER]).steps
            way += chain.of_manifest(manifest, len(own))
        except ValueError as error:
            raise RevisionCorrupt(revision, str(error)) from None
        steps += own
        if TENSORS in paths:
            moved |= dict.fromkeys(safetensors_file.names(paths[TENSORS]))
        blocks = max(blocks, int(manifest.get("blocks") or 0))
        last = manifest
    if not last:
        raise Conflict("revision 0 is the base model: there is nothing to export")
    return WeightsArchive(
        base_sha256,
        str(last["method"]),
        blocks,
        line[0],
        last["dtype"],
        last["update"],
        last["weights_sha256"],
        steps,
        chain.merged(way),
        tuple(moved),
    )


def read(data: bytes) -> Archive:
    """Raises InvalidRequest saying what is wrong with the file."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            described = json.loads(_member(archive, _DESCRIPTION))
            if not isinstance(described, dict) or described.get("format") != FORMAT:
                raise ValueError(f"its {_DESCRIPTION} is not one of {FORMAT}")
            if described.get("version") != VERSION:
                raise ValueError(f"it has version {described.get('version')}; this agentd reads version {VERSION}")
            files = _files(archive, described.get("files"))
        common: dict[str, Any] = {name: _text(described, name) for name in ("base_sha256", "method")}
        common |= {name: _count(described, name) for name in ("blocks", "origin")}
        match described.get("engine"):
            case WeightsArchive.engine:
                return _of_weights(described, files, common)
            case AdapterArchive.engine:
                return _of_adapters(files, common)
            case other:
                raise ValueError(f"it is of an engine {other!r:.60}, whose revisions are not taken in")
    except (tarfile.TarError, EOFError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequest(f"this is no exported adaptation: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise InvalidRequest(f"this adaptation cannot be used: {error}") from None


def _of_weights(described: dict[str, Any], files: dict[str, bytes], common: dict[str, Any]) -> WeightsArchive:
    if LEDGER not in files:
        raise ValueError(f"it has no {LEDGER}")
    steps = ledger.decode(files.pop(LEDGER))
    if steps.parent != 0 or not (steps.steps or files):
        raise ValueError("its ledger does not begin at the base, or is empty")
    segments = chain.from_json(described.get("segments"), len(steps.steps))
    factors = {LORA} if any(segment.ranks for segment in segments) else set()
    if set(files) - {TENSORS} != factors:
        raise ValueError(f"low-rank adapters are in {LORA}, and its segments say whether there are any")
    for content in files.values():
        safetensors_file.check(content)
    return WeightsArchive(
        dtype=_text(described, "dtype"),
        update=UpdateRule.from_json(described.get("update")).as_json(),
        weights_sha256=_text(described, "weights_sha256"),
        steps=steps.steps,
        segments=segments,
        files=files,
        **common,
    )


def _of_adapters(files: dict[str, bytes], common: dict[str, Any]) -> AdapterArchive:
    if not files or set(files) - {ADAPTER, CONTROL} or not all(each.startswith(b"GGUF") for each in files.values()):
        raise ValueError(f"as one of engine llamacpp it has {ADAPTER} or {CONTROL}, or both, and nothing else")
    return AdapterArchive(files=files, **common)


def _files(archive: tarfile.TarFile, sums: Any) -> dict[str, bytes]:
    """What the archive has beside its description, each found to be what that says."""
    if not isinstance(sums, dict) or set(archive.getnames()) - {_DESCRIPTION} != set(sums):
        raise ValueError(f"its {_DESCRIPTION} does not name the files that it has")
    files = {name: _member(archive, name) for name in sums}
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != sums[name]:
            raise ValueError(f"its {name} is not what was written (sha256 differs)")
    return files


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise ValueError(f"it has no {name}")
    return file.read()


def _text(described: dict[str, Any], name: str) -> str:
    value = described.get(name)
    if not isinstance(value, str) or (name.endswith("sha256") and not _SHA256.fullmatch(value)):
        raise ValueError(f"its {_DESCRIPTION} has no usable {name}")
    return value


def _count(described: dict[str, Any], name: str) -> int:
    value = described.get(name)
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"its {_DESCRIPTION} has no usable {name}")
    return value


def refuse_other_base(archive: Archive, base_sha256: str, engine: str) -> None:
    """Raises Conflict where it was learned by another engine, or on other weights than those that are served."""
    if archive.base_sha256 != base_sha256:
        raise Conflict(
            f"it was learned on the base with sha256 {archive.base_sha256}, and this device serves {base_sha256}: what "
            f"was learned means nothing there; name that base in model.path here, or teach this one with "
            f"`agentctl feedback export` there and `agentctl feedback import` here"
        )
    if archive.engine != engine:
        raise Conflict(
            f"it was learned by engine {archive.engine}, and this device runs engine {engine}; set engine: "
            f"{archive.engine} here, or teach this one with `agentctl feedback export` there and `agentctl feedback "
            f"import` here"
        )
