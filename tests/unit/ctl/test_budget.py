import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripted_daemon import Answer, ScriptedDaemon

MIB = 2**20


def term(process: str, name: str, size: int, reduce: str = "") -> dict[str, Any]:
    return {"process": process, "name": name, "bytes": size, "formula": f"the formula of {name}", "reduce": reduce}


def plan(method: str, blocks: int, needed: int, short: int, gain: float, *terms: dict[str, Any]) -> dict[str, Any]:
    expected = {"expected_gain": gain, "seconds": 95.5, "gain_per_second": gain / 95.5, "score": gain, "passes": 2}
    setting = {"method": method, "blocks": blocks, "checkpoint": False, "micro_tokens": 400}
    fits = {"needed_bytes": needed, "fits": not short, "shortfall_bytes": short}
    return {**setting, **fits, **expected, "terms": list(terms)}


ENGINE = [term("engine", "background KV cache", 45 * MIB, "lower model.context"), term("engine", "logits", 30 * MIB)]
ANSWER = {
    "reading": {"at": "2026-01-31T12:00:00.000Z", "available": 900 * MIB, "bound_by": "/sys/fs/cgroup/a/memory.max"},
    "available_bytes": 900 * MIB,
    "reserve_bytes": 256 * MIB,
    "limit_bytes": None,
    "budget_bytes": 644 * MIB,
    "model": {"name": "m", "n_layer": 30, "n_embd": 576, "n_head": 9, "n_vocab": 49152, "context": 4096},
    "workload": {"examples": 512, "note": "there is nothing to learn from; 512 examples are assumed"},
    "calibration": [
        {"process": "trainer", "family": "backpropagation", "factor": 1.05, "passes": 2, "bounds": [0.8, 1.5]}
    ],
    "passes": 2,
    "plans": [
        plan("elasticzo", 4, 661 * MIB, 17 * MIB, 0.296, *ENGINE, term("trainer", "runtime", 586 * MIB)),
        plan("elasticzo", 1, 500 * MIB, 0, 0.28, *ENGINE, term("trainer", "runtime", 425 * MIB)),
        plan("mezo", 0, 75 * MIB, 0, 0.2, *ENGINE),
    ],
    "chosen": {"method": "elasticzo", "blocks": 1, "checkpoint": False},
    "why": "elasticzo with 1 block needs 524.3 MB",
    "shortfall_bytes": 0,
}


@pytest.fixture
def daemon() -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon() as daemon:
        daemon.on("GET /admin/budget", Answer(ANSWER))
        yield daemon


def test_json_is_the_answer_as_it_came(daemon: ScriptedDaemon) -> None:
    assert json.loads(daemon.run("budget", "--json").stdout) == ANSWER


def test_a_pipe_gets_one_line_per_plan(daemon: ScriptedDaemon) -> None:
    rows = [line.split("\t") for line in daemon.run("budget").stdout.splitlines()]
    assert [row[:3] for row in rows] == [
        ["false", "elasticzo", "4"],
        ["true", "elasticzo", "1"],
        ["false", "mezo", "0"],
    ]
    assert rows[0][3:6] == [str(661 * MIB), "false", str(17 * MIB)]
    assert {len(row) for row in rows} == {10}


def test_a_terminal_gets_the_budget_the_plans_and_the_reason(daemon: ScriptedDaemon) -> None:
    code, screen = daemon.on_terminal("budget")
    assert code == 0
    assert "900.0 MiB available (bound by /sys/fs/cgroup/a/memory.max), 256.0 MiB kept free" in screen
    assert "a pass may take 644.0 MiB" in screen
    assert re.search(r"▶\s+elasticzo\s+1\s+500\.0 MiB\s+yes", screen)
    assert re.search(r"elasticzo\s+4\s+661\.0 MiB\s+no\s+17\.0 MiB", screen)
    assert "elasticzo with 1 block needs 524.3 MB" in screen
    assert "512 examples are assumed" in screen
    assert "trainer, backpropagation: x 1.050 from 2 passes" in screen


def test_the_best_plan_of_each_number_of_blocks_and_one_mark(daemon: ScriptedDaemon) -> None:
    """Two plans may share method, blocks and checkpoint; one of them would be taken."""
    tight, roomy, smaller = (
        plan("elasticzo", 1, n * MIB, max(0, n - 644) * MIB, 0.28, *ENGINE) for n in (700, 500, 90)
    )
    daemon.on("GET /admin/budget", Answer({**ANSWER, "plans": [tight, roomy, smaller, plan("mezo", 0, MIB, 0, 0.2)]}))
    rows = [line.split("\t")[:4] for line in daemon.run("budget").stdout.splitlines()]
    assert rows == [["true", "elasticzo", "1", str(500 * MIB)], ["false", "mezo", "0", str(MIB)]]
    every = [line.split("\t")[0] for line in daemon.run("budget", "--all").stdout.splitlines()]
    assert every == ["false", "true", "false", "false"]


def test_terms_are_those_of_the_plan_that_would_be_taken(daemon: ScriptedDaemon) -> None:
    rows = [line.split("\t") for line in daemon.run("budget", "--terms").stdout.splitlines()]
    assert [row[:3] for row in rows] == [
        ["engine", "background KV cache", str(45 * MIB)],
        ["engine", "logits", str(30 * MIB)],
        ["trainer", "runtime", str(425 * MIB)],
    ]
    assert rows[0][3:] == ["the formula of background KV cache", "lower model.context"]
    _, screen = daemon.on_terminal("budget", "--terms")
    assert "elasticzo, 1 blocks: 500.0 MiB, fits" in screen


def test_terms_of_the_smallest_plan_where_none_fits(daemon: ScriptedDaemon) -> None:
    plans = [{**each, "fits": False, "shortfall_bytes": MIB} for each in ANSWER["plans"]]  # type: ignore[attr-defined]
    daemon.on("GET /admin/budget", Answer({**ANSWER, "plans": plans, "chosen": None, "why": "too little"}))
    assert len(daemon.run("budget", "--terms").stdout.splitlines()) == 2
    assert "mezo, 0 blocks: 75.0 MiB, 1.0 MiB short" in daemon.on_terminal("budget", "--terms")[1]
    assert "▶" not in daemon.on_terminal("budget")[1]


def test_a_setting_is_asked_of_the_daemon(daemon: ScriptedDaemon) -> None:
    assert daemon.run("budget", "--method", "suffix-bp", "--blocks", "3").returncode == 0
    assert daemon.asked_for("GET /admin/budget")[0].query == {"method": "suffix-bp", "blocks": "3"}
    daemon.refuse("GET /admin/budget", 409, "there is no method 'sgd'", "pass_refused")
    result = daemon.run("budget", "--method", "sgd")
    assert (result.returncode, result.stderr) == (5, "agentctl: there is no method 'sgd'\n")


def test_the_papers_table_needs_no_daemon(daemon: ScriptedDaemon) -> None:
    rows = [line.split("\t") for line in daemon.run("budget", "--paper").stdout.splitlines()]
    figures = {(row[0], row[1]): [float(cell) for cell in row[2:]] for row in rows}
    assert figures["N", "2048"][0] == pytest.approx(57.42e9, rel=1e-4)
    assert figures["N", "2048"][3:] == [pytest.approx(3.997, abs=5e-4), pytest.approx(2.243, abs=5e-4)]
    assert figures["D", "512"][3] == pytest.approx(23.777, abs=5e-4)
    assert not daemon.requests
    code, screen = daemon.on_terminal("budget", "--paper")
    assert code == 0
    assert re.search(r"N\s+2048\s+57\.42 GB\s+32\.23 GB\s+14\.37 GB\s+3\.997\s+2\.243", screen)
    assert len(re.findall(r"BP / MeZO against", screen)) == 3
    assert re.search("[\u2801-\u28ff]", screen)


def test_the_analysis_of_another_model(daemon: ScriptedDaemon, real_model: Path) -> None:
    named = json.loads(daemon.run("budget", "--paper", "--json", "--model", "gpt2-medium").stdout)
    assert (named["model"]["name"], named["model"]["L"], named["model"]["D"]) == ("gpt2-medium", 24, 1024)
    file = json.loads(daemon.run("budget", "--paper", "--json", "--model", str(real_model)).stdout)
    assert (file["model"]["L"], file["model"]["D"], file["model"]["H"]) == (30, 576, 9)
    assert any(row["symbol"] == "D" and row["value"] == 576 for row in file["rows"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--paper", "--model", "gpt-7"], 2, "no model of that name; named ones: llama-2-7b"),
        (["--paper", "--model", __file__], 1, "test_budget.py"),
        (["--plot", "figure.gif", "--model", "llama-2-7b"], 2, ".png or .svg"),
        (["--model", "llama-2-7b"], 2, "goes with --paper or --plot"),
        (["--blocks", "-1"], 2, "--blocks"),
    ],
)
def test_wrong_usage(daemon: ScriptedDaemon, arguments: list[str], code: int, message: str) -> None:
    result = daemon.run("budget", *arguments)
    assert result.returncode == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_plotting_draws_or_says_what_is_missing(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    """Without --model it is the daemon's model that is drawn."""
    file = tmp_path / "figure.svg"
    # matplotlib may warn about fonts and caches; that is no error of ours
    result = daemon.run("budget", "--plot", str(file), PYTHONWARNINGS="default", MPLCONFIGDIR=str(tmp_path))
    assert daemon.asked_for("GET /admin/budget")
    if result.returncode == 0:
        assert file.read_text().count('<g id="axes_') == 6
        assert "m: N=4096, L=30, D=576, H=9" in file.read_text() or file.stat().st_size > 10_000
    else:
        assert "pip install 'agentd[plot]'" in result.stderr
        assert not file.exists()


def test_help_imports_nothing_heavy(daemon: ScriptedDaemon) -> None:
    code = (
        "import sys; from agentd.ctl.app import run; run(['budget', '--help']); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'matplotlib', 'rich'}), "
        "[m for m in sys.modules if m.startswith('agentd.budget')], file=sys.stderr)"
    )
    before = os.times()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=daemon.environment())
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert result.stderr == "[] []\n"
