"""What serving takes besides weights comes off before contexts are given their size."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from agentd import models
from agentd.adapt.kinds.kind import LanguageKind
from agentd.adapt.kinds.llamacpp import LlamaCpp
from agentd.adapt.kinds.transformers import Transformers
from agentd.budget.footprint import MIB
from agentd.budget.in_place import joint_bytes, served_shapes
from agentd.config.schema import Config, MemorySettings, ModelSettings, PrefixSettings, ServeSettings, StateSettings
from agentd.formats.gguf_header import read_header
from agentd.limits import joint_rows
from agentd.models import ModelFile
from tools import tiny_model


@pytest.fixture
def file(tmp_path: Path) -> ModelFile:
    path = tiny_model.write(tmp_path / "tiny.gguf")
    header, digest = read_header(path), "0" * 64
    return ModelFile(path, digest, path.stat().st_size, header, (path,), (digest,), models.cache(), False)


def config(tmp_path: Path, slots: int = 4, dtype: str = "float32") -> Config:
    serve = ServeSettings(slots=slots, prefixes=PrefixSettings(memory=128 * MIB, disk=MIB))
    return Config(
        state=StateSettings(dir=tmp_path),
        memory=MemorySettings(reserve=0),
        model=ModelSettings.model_validate({"dtype": dtype}),
        serve=serve,
    )


@pytest.mark.parametrize("engine", [LlamaCpp, Transformers])
def test_prefixes_have_an_eighth_of_what_is_free_at_most(
    engine: type[LanguageKind], file: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, expected in ((80 * MIB, 10 * MIB), (8192 * MIB, 128 * MIB), (0, 0)):
        monkeypatch.setattr("agentd.host.memory.read", lambda free=free: SimpleNamespace(available=free))
        kind = engine(file)
        kept = kind.settings(kind.fitted(config(tmp_path)))["prefixes"]
        assert expected - MIB <= kept["memory"] <= expected
        assert kept["disk"] == (MIB if kept["memory"] else 0)
        assert kept["key"] == file.sha256
        assert Path(kept["folder"]) == tmp_path / "prefixes"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_slots_at_once_are_a_part_of_what_serving_takes(file: ModelFile, tmp_path: Path, dtype: str) -> None:
    kind = Transformers(file)
    shapes = served_shapes(file.header, dtype)  # type: ignore[arg-type]
    sizes = [kind.serving_bytes(config(tmp_path, slots, dtype)) for slots in (1, 4, 8, 32)]
    assert sizes == sorted(sizes)
    assert sizes == [joint_bytes(shapes, slots) for slots in (1, 4, 8, 32)]
    number = {"float32": 4, "bfloat16": 2}[dtype]
    assert sizes[2] >= joint_rows(8) * shapes.n_vocab * (number + 4)


def test_rows_of_several_sequences_have_few_sizes() -> None:
    sizes = {n: joint_rows(n) for n in range(2, 300)}
    assert all(n <= size < 2 * n or size == 4 for n, size in sizes.items())
    assert sorted(set(sizes.values()))[:6] == [4, 8, 16, 32, 64, 128]
    assert all(size % 64 == 0 for size in sizes.values() if size > 32)
