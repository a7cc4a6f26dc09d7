"""An adaptation as a file of kilobytes: every step of a revision's line, and what is needed to know that they fit.

A tar. `adaptation.json` says on which base (sha256) and in which type the steps were taken, how they move the weights,
and the sha256 of the weights that they lead to; `ledger` holds all steps from the base to the revision, in order
(learn/ledger.py). Where backpropagation has moved something in that line, `tensors.safetensors` has its values in the
end, and the steps are on the others (version 2). A line of low-rank changes alone has no steps: `lora.safetensors` has
the factors of all of them side by side, and `ranks` says where each ends (version 3). Whoever has the same base gets
the same weights, bit for bit.
"""

import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from agentd.adapt import tensor_file
from agentd.adapt.revision_files import LEDGER, LORA, TENSORS, RevisionFiles
from agentd.errors import Conflict, InvalidRequest
from agentd.learn import ledger
from agentd.learn.ledger import Ledger, Step

FORMAT, VERSIONS = "agentd-adaptation", (1, 2, 3)  # steps alone; with tensors; low-rank changes
_DESCRIPTION = "adaptation.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Adaptation:
    """`update` is how the steps move the weights, as a manifest has it; `origin` the revision's number where it was
    made, for the reader alone. `moved` names what backpropagation moved, in up to `blocks` last blocks, `ranks` are
    those of low-rank changes, and `tensors` is the file with values or factors as it was read."""

    base_sha256: str
    dtype: str
    update: dict[str, Any]
    weights_sha256: str
    method: str
    origin: int
    steps: list[Step] = field(repr=False)
    blocks: int = 0
    moved: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    tensors: bytes = field(default=b"", repr=False)

    @property
    def version(self) -> int:
        return 3 if self.ranks else 2 if self.moved else 1

    def write(self, out: IO[bytes], tensors: Path | None = None) -> None:
        """Writes the file; `tensors` has the values of what `moved` names, or the factors of the changes. Equal
        adaptations give equal bytes."""
        told = ("base_sha256", "dtype", "update", "weights_sha256", "method", "origin")
        described = {name: value for name, value in asdict(self).items() if name in told}
        described |= {"format": FORMAT, "version": self.version}
        if self.version > 1:
            described["blocks"] = self.blocks
        if self.ranks:
            described["ranks"] = list(self.ranks)
        text = json.dumps(described, indent=2, sort_keys=True).encode() + b"\n"
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in ((_DESCRIPTION, text), (LEDGER, ledger.encode(Ledger(0, self.steps)))):
                _add(archive, name, len(data), io.BytesIO(data))
            if tensors is not None:
                with tensors.open("rb") as file:
                    _add(archive, LORA if self.ranks else TENSORS, tensors.stat().st_size, file)


def gather(files: RevisionFiles, line: Sequence[int], base_sha256: str) -> Adaptation:
    """The adaptation that leads from the base to the newest of `line`, which goes from there to the base.

    Raises RevisionCorrupt, Conflict where its revisions are not all ledgers of one kind, or all low-rank changes.

    What backpropagation has moved anywhere in the line is in `moved`: its value in the end is all that counts, and
    what moves the others depends on nothing but seeds, so all steps may be taken on them one after the other.
    """
    steps: list[Step] = []
    moved: dict[str, None] = {}
    blocks = 0
    ranks: list[int] = []
    last: dict[str, Any] = {}
    for revision in reversed([number for number in line if number]):
        found = files.verified(revision)
        manifest = files.manifest(revision) or {}
        if LEDGER not in found or set(found) - {LEDGER, TENSORS, LORA} or not manifest.get("weights_sha256"):
            raise Conflict(f"revision {revision} is no ledger of steps on the weights; --format says what it can be")
        rule = manifest["update"]
        if last and (rule != last["update"] or rule.get("sparsity")):
            raise Conflict(
                f"the line of revision {line[0]} has runs of different kinds, or several sparse ones, which do not "
                f"make one ledger; export its weights (--format safetensors)"
            )
        steps += ledger.read(found[LEDGER]).steps
        ranks += manifest.get("ranks") or []
        if TENSORS in found:
            moved |= dict.fromkeys(tensor_file.names(found[TENSORS]))
        blocks = max(blocks, int(manifest.get("blocks") or 0))
        last = manifest
    if not last:
        raise Conflict("revision 0 is the base model: there is nothing to export")
    if ranks and (steps or moved):
        raise Conflict(
            f"the line of revision {line[0]} has low-rank changes and other steps, whose order a single file does not "
            f"keep; export its weights (--format safetensors)"
        )
    told = base_sha256, last["dtype"], last["update"], last["weights_sha256"], str(last["method"]), line[0]
    return Adaptation(*told, steps, blocks, tuple(moved), tuple(ranks))


def read(data: bytes) -> Adaptation:
    """Raises InvalidRequest saying what is wrong with the file."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            described = json.loads(_member(archive, _DESCRIPTION))
            steps = ledger.decode(_member(archive, LEDGER))
            kept = [name for name in (TENSORS, LORA) if name in archive.getnames()]
            tensors = _member(archive, kept[0]) if kept else b""
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            raise ValueError(f"its {_DESCRIPTION} is not one of {FORMAT}")
        if described.get("version") not in VERSIONS:
            raise ValueError(
                f"it has version {described.get('version')}; this agentd reads up to version {VERSIONS[-1]}"
            )
        if tensors:
            tensor_file.check(tensors)
        wanted = [[], [TENSORS], [LORA]][described["version"] - 1]
        if kept != wanted or (wanted and not tensors):
            raise ValueError(f"as version {described['version']} it must have {' '.join(wanted) or 'no tensors'}")
        return _checked(described, steps, tensors)
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


def _checked(described: dict[str, Any], steps: Ledger, tensors: bytes) -> Adaptation:
    texts = {}
    for name in ("base_sha256", "weights_sha256", "dtype", "method"):
        value = described.get(name)
        if not isinstance(value, str) or (name.endswith("sha256") and not _SHA256.fullmatch(value)):
            raise ValueError(f"its {_DESCRIPTION} has no usable {name}")
        texts[name] = value
    update, origin = described.get("update"), described.get("origin")
    if not isinstance(update, dict) or set(update) != {"distribution", "sparsity"} or type(origin) is not int:
        raise ValueError(f"its {_DESCRIPTION} has no usable update or origin")
    if update["distribution"] not in ("rademacher", "gaussian"):
        raise ValueError(f"its update has the distribution {update['distribution']!r}")
    sparsity = update["sparsity"]
    if sparsity is not None and not (isinstance(sparsity, float) and 0 < sparsity < 1):
        raise ValueError(f"its update has the sparsity {sparsity!r}")
    if steps.parent != 0 or not (steps.steps or tensors):
        raise ValueError("its ledger does not begin at the base, or is empty")
    blocks = described.get("blocks", 0)
    if type(blocks) is not int or not 0 <= blocks <= 10_000:
        raise ValueError(f"its {_DESCRIPTION} has no usable blocks")
    ranks = described.get("ranks", [])
    if not isinstance(ranks, list) or not all(type(rank) is int and 0 < rank <= 1 << 16 for rank in ranks):
        raise ValueError(f"its {_DESCRIPTION} has no usable ranks")
    if bool(ranks) != (described["version"] == 3) or (ranks and steps.steps):
        raise ValueError("ranks belong to low-rank changes, which have no steps beside them")
    return Adaptation(
        base_sha256=texts["base_sha256"],
        dtype=texts["dtype"],
        update=update,
        weights_sha256=texts["weights_sha256"],
        method=texts["method"],
        origin=origin,
        steps=steps.steps,
        blocks=blocks,
        ranks=tuple(ranks),
        tensors=tensors,
    )


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
