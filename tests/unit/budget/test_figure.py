import builtins
from pathlib import Path
from typing import Any

import pytest

from agentd.budget.equations import LLAMA_2_7B
from agentd.budget.figure import PlottingUnavailable, draw


@pytest.mark.slow
@pytest.mark.parametrize(("name", "magic"), [("fig.png", b"\x89PNG"), ("fig.svg", b"<?xml")])
def test_six_panels_are_drawn(tmp_path: Path, name: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    draw(tmp_path / name, "llama-2-7b", LLAMA_2_7B)
    data = (tmp_path / name).read_bytes()
    assert data.startswith(magic)
    if name.endswith(".svg"):
        assert data.count(b'<g id="axes_') == 6


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(PlottingUnavailable, match=r"agentd\[plot\]"):
        draw(tmp_path / "fig.png", "llama-2-7b", LLAMA_2_7B)
    assert not (tmp_path / "fig.png").exists()
