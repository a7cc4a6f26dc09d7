"""An adaptation as a file of kilobytes: every step of a revision's line, and what is needed to know that they fit.

A tar. `adaptation.json` says on which base (sha256) and in which type the steps were taken, how they move the weights,
and the sha256 of the weights that they lead to; `ledger` holds all steps from the base to the revision, in order
(learn/ledger.py). Where backpropagation has moved something in that line, `tensors.safetensors` has its values in the
end, and the steps are on the others (version 2). A line of low-rank changes alone has no steps: `lora.safetensors` has
the factors of all of them side by side, and `ranks` says where each ends (version 3). Where steps of several kinds, or
steps and changes, follow one another, `legs` has their order (version 4). Whoever has the same base gets the same
weights, bit for bit.
"""

import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from agentd.adapt import tensor_file
from agentd.adapt.revision_files import LEDGER, LORA, TENSORS, RevisionFiles
from agentd.errors import Conflict, InvalidRequest, RevisionCorrupt
from agentd.learn import ledger, legs
from agentd.learn.ledger import Ledger, Step
from agentd.learn.legs import Leg

FORMAT, VERSIONS = "agentd-adaptation", (1, 2, 3, 4)  # steps alone; with tensors; low-rank changes; several legs
_DESCRIPTION = "adaptation.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Adaptation:
    """`update` is how the last steps move the weights, as a manifest has it; `origin` the revision's number where it
    was made, for the reader alone. `moved` names what backpropagation moved, in up to `blocks` last blocks, `legs` are
    the way from the base, and `files` has by name those with values or factors as they were read."""

    base_sha256: str
    dtype: str
    update: dict[str, Any]
    weights_sha256: str
    method: str
    origin: int
    steps: list[Step] = field(repr=False)
    blocks: int = 0
    moved: tuple[str, ...] = ()
    legs: tuple[Leg, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those of all low-rank changes."""
        return tuple(rank for leg in self.legs for rank in leg.ranks)

    @property
    def version(self) -> int:
        if len(self.legs) > 1 or (self.ranks and (self.moved or TENSORS in self.files)):
            return 4
        return 3 if self.ranks else 2 if self.moved else 1

    def write(self, out: IO[bytes], files: Mapping[str, Path]) -> None:
        """Writes the file; `files` are, by name, those with the values of what `moved` names and with the factors of
        the changes. Equal adaptations give equal bytes."""
        told = ("base_sha256", "dtype", "update", "weights_sha256", "method", "origin")
        described = {name: getattr(self, name) for name in told}
        described |= {"format": FORMAT, "version": self.version}
        if self.version > 1:
            described["blocks"] = self.blocks
        if self.version == 3:
            described["ranks"] = list(self.ranks)
        if self.version == 4:
            described["legs"] = [leg.as_json() for leg in self.legs]
        text = json.dumps(described, indent=2, sort_keys=True).encode() + b"\n"
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in ((_DESCRIPTION, text), (LEDGER, ledger.encode(Ledger(0, self.steps)))):
                _add(archive, name, len(data), io.BytesIO(data))
            for name in sorted(files):
                with files[name].open("rb") as file:
                    _add(archive, name, files[name].stat().st_size, file)


def gather(files: RevisionFiles, line: Sequence[int], base_sha256: str) -> Adaptation:
    """The adaptation that leads from the base to the newest of `line`, which goes from there to the base.

    Raises RevisionCorrupt, Conflict where a revision is not what engine transformers makes.

    What backpropagation has moved anywhere in the line is in `moved`: its value in the end is all that counts, and
    what moves the others depends on nothing but themselves, so all legs may be gone on them one after the other.
    """
    steps: list[Step] = []
    moved: dict[str, None] = {}
    blocks = 0
    way: list[Leg] = []
    last: dict[str, Any] = {}
    for revision in reversed([number for number in line if number]):
        found = files.verified(revision)
        manifest = files.manifest(revision) or {}
        if LEDGER not in found or set(found) - {LEDGER, TENSORS, LORA} or not manifest.get("weights_sha256"):
            raise Conflict(f"revision {revision} is no ledger of steps on the weights; --format says what it can be")
        try:
            own = ledger.read(found[LEDGER]).steps
            way += legs.of_manifest(manifest, len(own))
        except ValueError as error:
            raise RevisionCorrupt(revision, str(error)) from None
        steps += own
        if TENSORS in found:
            moved |= dict.fromkeys(tensor_file.names(found[TENSORS]))
        blocks = max(blocks, int(manifest.get("blocks") or 0))
        last = manifest
    if not last:
        raise Conflict("revision 0 is the base model: there is nothing to export")
    told = base_sha256, last["dtype"], last["update"], last["weights_sha256"], str(last["method"]), line[0]
    return Adaptation(*told, steps, blocks, tuple(moved), legs.joined(way))


def read(data: bytes) -> Adaptation:
    """Raises InvalidRequest saying what is wrong with the file."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            described = json.loads(_member(archive, _DESCRIPTION))
            steps = ledger.decode(_member(archive, LEDGER))
            files = {name: _member(archive, name) for name in (TENSORS, LORA) if name in archive.getnames()}
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            raise ValueError(f"its {_DESCRIPTION} is not one of {FORMAT}")
        if described.get("version") not in VERSIONS:
            raise ValueError(
                f"it has version {described.get('version')}; this agentd reads up to version {VERSIONS[-1]}"
            )
        for data in files.values():
            tensor_file.check(data)
        return _checked(described, steps, files)
    except (tarfile.TarError, EOFError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequest(f"this is no exported adaptation: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise InvalidRequest(f"this adaptation cannot be used: {error}") from None


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise ValueError(f"it has no {name}")
    return file.read()


def _add(archive: tarfile.TarFile, name: str, size: int, data: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    archive.addfile(member, data)


def _checked(described: dict[str, Any], steps: Ledger, files: Mapping[str, bytes]) -> Adaptation:
    texts = {}
    for name in ("base_sha256", "weights_sha256", "dtype", "method"):
        value = described.get(name)
        if not isinstance(value, str) or (name.endswith("sha256") and not _SHA256.fullmatch(value)):
            raise ValueError(f"its {_DESCRIPTION} has no usable {name}")
        texts[name] = value
    if type(described.get("origin")) is not int:
        raise ValueError(f"its {_DESCRIPTION} has no usable origin")
    rule = legs.rule_of(described.get("update"))
    if steps.parent != 0 or not (steps.steps or files):
        raise ValueError("its ledger does not begin at the base, or is empty")
    blocks = described.get("blocks", 0)
    if type(blocks) is not int or not 0 <= blocks <= 10_000:
        raise ValueError(f"its {_DESCRIPTION} has no usable blocks")
    way = _way(described, rule, len(steps.steps))
    ranks = any(leg.ranks for leg in way)
    wanted = {1: set(), 2: {TENSORS}, 3: {LORA}, 4: {TENSORS} & set(files) | ({LORA} if ranks else set())}
    version = described["version"]
    if set(files) != wanted[version]:
        names = " and ".join(sorted(wanted[version])) or "no tensors"
        raise ValueError(f"as version {version} it must have {names}")
    return Adaptation(
        base_sha256=texts["base_sha256"],
        dtype=texts["dtype"],
        update=dict(rule),
        weights_sha256=texts["weights_sha256"],
        method=texts["method"],
        origin=described["origin"],
        steps=steps.steps,
        blocks=blocks,
        legs=way,
        files=files,
    )


def _way(described: dict[str, Any], rule: legs.Rule, steps: int) -> tuple[Leg, ...]:
    """The legs, which before version 4 were one, of `steps` by `rule` or of changes."""
    if described["version"] == 4:
        return legs.checked(described.get("legs"), steps)
    if bool(described.get("ranks")) != (described["version"] == 3) or (steps and described["version"] == 3):
        raise ValueError("ranks belong to low-rank changes, which have no steps beside them")
    return legs.of_manifest({"ranks": described.get("ranks"), "update": dict(rule)}, steps)


def refuse_misfit(adaptation: Adaptation, base_sha256: str, dtype: str) -> None:
    """Raises Conflict where the adaptation was learned on other weights than those that are served."""
    if adaptation.base_sha256 != base_sha256:
        raise Conflict(
            f"it was learned on the base with sha256 {adaptation.base_sha256}, and this device serves "
            f"{base_sha256}: its steps mean nothing there"
        )
    if adaptation.dtype != dtype:
        raise Conflict(
            f"it was learned in {adaptation.dtype}, and this device serves {dtype}; set model.dtype: {adaptation.dtype}"
        )
