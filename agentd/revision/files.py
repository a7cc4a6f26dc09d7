"""Revisions on disk: immutable directories with checksums, written so that a power cut leaves whole ones only.

revisions/<n>/manifest.json   what it is, from what, and the sha256 of every other file
revisions/<n>/adapter.gguf    LoRA, as stock llama.cpp tools load it (only if there is one)
revisions/<n>/control.gguf    control vector, likewise
revisions/<n>/ledger          the zeroth-order steps that made the control vector from the parent's
revisions/<n>/network.safetensors   of a classifier, instead of adapter and control vector: the whole int8 network

Of engine transformers there is a ledger alone: its steps are on the weights themselves, and the manifest says how they
move them and the sha256 that they lead to. What backpropagation has moved is beside it, in tensors.safetensors, or the
low-rank changes that were learned, in lora.safetensors.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agentd import faults
from agentd.durable import make_directory, new_file, sha256, storage_error, sync_directory
from agentd.errors import RevisionCorrupt

ADAPTER, CONTROL, LEDGER, MANIFEST = "adapter.gguf", "control.gguf", "ledger", "manifest.json"
NETWORK = "network.safetensors"
TENSORS, LORA = "tensors.safetensors", "lora.safetensors"

_WEIGHTS = (ADAPTER, CONTROL, NETWORK)
_CHUNK = 1 << 20  # bytes in memory at a time


class RevisionFiles:
    """`digests` are the sha256 of the manifests that the database knows, by revision; a manifest must match its own."""

    def __init__(self, root: Path, base_sha256: str, digests: Mapping[int, str] | None = None) -> None:
        self._root, self._base, self._digests = root, base_sha256, dict(digests or {})
        make_directory(root)

    @property
    def base_sha256(self) -> str:
        """Of the model's file."""
        return self._base

    def directory(self, revision: int) -> Path:
        return self._root / str(revision)

    def write(self, revision: int, files: Mapping[str, Path], manifest: Mapping[str, Any]) -> str:
        """Copies `files` in and returns the manifest's sha256. Raises StorageFull or StorageFailed, leaving nothing."""
        target, temporary = self.directory(revision), self._root / f".{revision}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(mode=0o700)
            sums = {}
            for name, source in files.items():
                digest, size = _copy(source, temporary / name)
                sums[name] = {"sha256": digest, "bytes": size}
            body = {**manifest, "revision": revision, "base_sha256": self._base, "files": sums}
            text = json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
            with new_file(temporary / MANIFEST) as file:
                file.write(text)
            faults.point("revision files written")
            sync_directory(temporary)
            temporary.rename(target)
            faults.point("revision files renamed")
            sync_directory(self._root)
            faults.point("revision files synced")
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise storage_error(error, f"revision {revision}") from None
        self._digests[revision] = hashlib.sha256(text).hexdigest()
        return self._digests[revision]

    def manifest(self, revision: int) -> dict[str, Any] | None:
        """What is written about a revision; None for the base. Raises RevisionCorrupt."""
        if revision == 0:
            return None
        try:
            text = (self.directory(revision) / MANIFEST).read_bytes()
            if self._digests.get(revision) not in (None, hashlib.sha256(text).hexdigest()):
                raise ValueError("sha256 differs")
            tree = json.loads(text)
            if not isinstance(tree["files"], dict):
                raise TypeError("files")
        except OSError as error:
            raise RevisionCorrupt(revision, f"its manifest cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise RevisionCorrupt(revision, "its manifest is damaged") from None
        return dict(tree)

    def verified(self, revision: int) -> dict[str, Path]:
        """The files of a revision, each found to be what the manifest says. Raises RevisionCorrupt."""
        manifest = self.manifest(revision)
        if manifest is None:
            return {}
        if manifest.get("base_sha256") != self._base:
            raise RevisionCorrupt(revision, "it was made for another base model")
        paths = {}
        for name, facts in manifest["files"].items():
            path = self.directory(revision) / Path(name).name
            try:
                digest = sha256(path)
            except OSError as error:
                raise RevisionCorrupt(revision, f"{name} cannot be read ({error.strerror})") from None
            if not isinstance(facts, dict) or digest != facts.get("sha256"):
                raise RevisionCorrupt(revision, f"{name} is not what was written (sha256 differs)")
            paths[name] = path
        return paths

    def weights(self, revision: int) -> tuple[Path | None, Path | None]:
        """Adapter (or a classifier's network, or a ledger that is all there is) and control vector of a revision,
        verified. Raises RevisionCorrupt."""
        files = self.verified(revision)
        if not any(name in files for name in _WEIGHTS):
            return files.get(LEDGER), None
        return files.get(ADAPTER, files.get(NETWORK)), files.get(CONTROL)

    def size(self, revision: int) -> int:
        """Bytes on disk."""
        if revision == 0:
            return 0
        return sum(path.stat().st_size for path in self.directory(revision).glob("*") if path.is_file())

    def remove(self, revision: int) -> None:
        """Deletes the files of a revision that is given up."""
        shutil.rmtree(self.directory(revision), ignore_errors=True)

    def twin(self, files: Mapping[str, Path], others: Iterable[int]) -> int | None:
        """The one of `others` whose weights are these very files, if there is one."""
        names = _WEIGHTS if any(name in files for name in _WEIGHTS) else (LEDGER, TENSORS, LORA)
        sums = {name: sha256(path) for name, path in files.items() if name in names}
        for other in others:
            with contextlib.suppress(RevisionCorrupt):
                known = (self.manifest(other) or {"files": {}})["files"]
                if {name: facts["sha256"] for name, facts in known.items() if name in names} == sums:
                    return other
        return None

    def reconcile(self, known: set[int]) -> list[str]:
        """Removes what no row knows: directories a crash left behind. Returns their names."""
        removed = []
        for path in self._root.iterdir():
            if not (path.name.isdigit() and int(path.name) in known):
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path.name)
        return removed


def _copy(source: Path, target: Path) -> tuple[str, int]:
    """Returns the sha256 and the number of bytes copied, which are on disk then."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as old, new_file(target) as new:
        while part := old.read(_CHUNK):
            digest.update(part)
            size += new.write(part)
    return digest.hexdigest(), size
