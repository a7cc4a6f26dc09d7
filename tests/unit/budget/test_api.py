"""GET /admin/budget over the real store and model; no engine and no pass is needed for it."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from agentd import models
from agentd.adapt.kinds.llamacpp import LlamaCpp
from agentd.api import access
from agentd.api.app import application
from agentd.api.services import Services
from agentd.config.schema import Config, MemorySettings, StateSettings
from agentd.formats.gguf_header import read_header
from agentd.models import ModelFile
from agentd.store import imports, passes, tasks
from agentd.store.database import Store
from agentd.store.examples import NewExample


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "agentd.db")
    yield store
    store.close()


def client(
    store: Store, model: Path, tmp_path: Path, probed: dict[str, Any] | None = None, **memory: Any
) -> TestClient:
    config = Config(state=StateSettings(dir=tmp_path), memory=MemorySettings(**memory))
    nobody = cast(Any, None)  # the engine and its requests: this handler asks none of them
    file = ModelFile(
        model, "0" * 64, model.stat().st_size, read_header(model), (model,), ("0" * 64,), models.cache(), False
    )

    async def known() -> dict[str, Any] | None:
        return probed

    passes = cast(Any, SimpleNamespace(known=known, kind=LlamaCpp(file)))
    services = Services(config, store, nobody, nobody, passes, file, nobody)
    return TestClient(application(services, access.ADMIN), raise_server_exceptions=True)


def test_plans_with_their_terms_and_the_one_that_would_be_taken(store: Store, real_model: Path, tmp_path: Path) -> None:
    answer = client(store, real_model, tmp_path).get("/admin/budget").json()
    assert answer["budget_bytes"] == answer["available_bytes"] - answer["reserve_bytes"]
    assert answer["reading"]["available"] == answer["available_bytes"]
    assert answer["model"]["n_layer"] == 30
    assert "are assumed" in answer["workload"]["note"]
    assert len(answer["plans"]) == 46
    chosen = answer["plans"][0]
    assert {name: chosen[name] for name in answer["chosen"]} == answer["chosen"]
    assert answer["why"].startswith(f"{chosen['method']} with {chosen['blocks']} blocks")
    for plan in answer["plans"]:
        assert plan["needed_bytes"] == sum(term["bytes"] for term in plan["terms"])
        assert plan["fits"] is (plan["shortfall_bytes"] == 0)
        assert all(term["formula"] for term in plan["terms"])


def test_plans_are_those_of_this_trainer(store: Store, real_model: Path, tmp_path: Path) -> None:
    """What it said when the first pass was planned: no backpropagation here, or products in bfloat16."""
    without = {"supported": False, "reason": "it is a Mamba", "bf16": False}
    answer = client(store, real_model, tmp_path, without).get("/admin/budget").json()
    assert [plan["method"] for plan in answer["plans"]] == ["mezo"]
    refused = client(store, real_model, tmp_path, without).get("/admin/budget", params={"blocks": "2"})
    assert refused.status_code == 409
    assert "it is a Mamba" in refused.json()["error"]["message"]
    for bf16 in (False, True):
        answer = client(store, real_model, tmp_path, {"supported": True, "bf16": bf16}).get("/admin/budget").json()
        assert any(plan["bf16"] for plan in answer["plans"]) is bf16


def test_where_nothing_fits_it_says_what_is_missing(store: Store, real_model: Path, tmp_path: Path) -> None:
    answer = client(store, real_model, tmp_path, limit=10**6).get("/admin/budget").json()
    assert answer["chosen"] is None
    assert answer["shortfall_bytes"] == min(plan["needed_bytes"] for plan in answer["plans"]) - 10**6
    assert "memory.limit allows 1.0 MB" in answer["why"]
    assert not any(plan["fits"] for plan in answer["plans"])


def test_one_setting_alone(store: Store, real_model: Path, tmp_path: Path) -> None:
    ask = client(store, real_model, tmp_path)
    plans = ask.get("/admin/budget", params={"method": "suffix-bp", "blocks": "3"}).json()["plans"]
    settings = sorted((plan["method"], plan["blocks"], plan["checkpoint"], plan["small"]) for plan in plans)
    assert settings == [("suffix-bp", 3, *how) for how in ((False, False), (False, True), (True, False))]
    assert ask.get("/admin/budget", params={"blocks": "many"}).status_code == 400
    assert ask.get("/admin/budget", params={"block": "3"}).status_code == 400
    assert ask.get("/admin/budget", params={"method": "sgd"}).status_code == 409


def test_real_examples_and_earlier_passes_count(store: Store, real_model: Path, tmp_path: Path) -> None:
    def fill(db: Any) -> None:
        tasks.declare(db, tasks.Task("t", ["yes", "no"], False, "accuracy", None, "config", "2026-01-01T00:00:00Z"))
        text = "A film about a lighthouse, number {}."
        new = [NewExample("t", "label", {"prompt": text.format(i)}, "yes" if i % 2 else "no", None) for i in range(300)]
        imports.add_many(db, new)
        passes.create(db, "manual", 0, 0, {})
        figures = {"adapted": True, "before": {"accuracy": 0.5}, "after": {"accuracy": 0.8}}
        planned = {"method": "suffix-bp", "blocks": 1, "predicted": {"trainer: runtime": 500}}
        passes.advance(db, 1, "planned", **planned)
        passes.advance(db, 1, "tapped")
        passes.advance(db, 1, "trained")
        passes.advance(db, 1, "gated", gate={"tasks": {"t": figures}})
        for state in ("staged", "trial", "committed"):
            passes.advance(db, 1, state)
        passes.update(db, 1, peaks={"trainer": 550}, phases={"train": 50.0})

    store.do(fill)
    answer = client(store, real_model, tmp_path).get("/admin/budget").json()
    assert answer["workload"]["note"] is None
    assert answer["workload"]["examples"] == 300
    assert answer["passes"] == 1
    assert [(f["process"], f["factor"]) for f in answer["calibration"]] == [("trainer", pytest.approx(1.122))]
    terms = next(plan["terms"] for plan in answer["plans"] if plan["blocks"] == 4)
    assert "calibration" in {term["name"] for term in terms if term["process"] == "trainer"}
