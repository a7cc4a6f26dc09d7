"""What README.md and docs/ show is run here, as it stands there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import shared

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_readme_s_client_works_as_printed(real_model: Path) -> None:
    daemon = shared(real_model)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    socket = "/run/user/1000/agentd/api.sock"
    assert socket in code
    before = daemon.counts()["feedback"]
    run = subprocess.run(
        [sys.executable, "-c", code.replace(socket, str(daemon.api))], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"(yes|no) from revision 0\n", run.stdout)
    assert daemon.counts()["feedback"] == before + 1


def test_the_api_s_examples_are_accepted(real_model: Path) -> None:
    daemon = shared(real_model)
    lines = [line.strip() for line in API.splitlines() if line.strip().startswith('{"task"')]
    assert len(lines) == 6  # a label, a text, a pair, a thumb, a score, a call
    imported = daemon.post("/v1/examples", "\n".join(lines).encode())
    assert (imported.status, imported.json.get("tasks")) == (200, {"reviews": 1, "notes": 1, "style": 3, "home": 1})
    (example,) = [line.strip() for line in API.splitlines() if line.strip().startswith('{"inference_id"')]
    answer = daemon.ask("Was it good?", metadata={"task": "reviews"})
    body = {**json.loads(example), "inference_id": answer.json["id"]}
    assert daemon.post("/v1/feedback", body).status == 201


def test_the_prompt_shown_is_the_one_configured() -> None:
    configured = (ROOT / "configs" / "reviews.yaml").read_text(encoding="utf-8")
    question = "Did the reviewer like this movie? Answer yes or no."
    assert question in README
    assert question in configured


@pytest.mark.parametrize(
    "name", sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_lead_to_files(name: str) -> None:
    document = ROOT / name
    links = re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def test_every_command_the_readme_names_exists() -> None:
    commands = set(re.findall(r"^    agentctl ([a-z-]+)", README, flags=re.MULTILINE))
    assert len(commands) >= 6
    listed = subprocess.run(
        [sys.executable, "-m", "agentd.ctl.app", "--help"], capture_output=True, text=True, check=True
    )
    assert all(re.search(rf"^  {command}\b", listed.stdout, flags=re.MULTILINE) for command in commands), listed.stdout
