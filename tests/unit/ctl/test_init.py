"""`agentctl init` and `agentctl completion`."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentd.config import schema
from tests.support.scripted_daemon import ScriptedDaemon, command


@pytest.fixture
def daemon() -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon() as daemon:
        yield daemon


def test_options_say_it_all(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    path, model = tmp_path / "new" / "agentd.yaml", tmp_path / "model.gguf"
    model.touch()
    options = ["--model", str(model), "--task", "reviews=yes, no", "--task", 'a "b": c', "--memory", "600MiB"]
    result = daemon.run("init", str(path), "-y", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(path)
    config = schema.load(path, {})
    assert config.model.path == str(model)
    assert config.memory.limit == 600 << 20
    assert config.tasks["reviews"].choices == ("yes", "no")
    assert config.tasks['a "b": c'].choices == ()


def test_without_options_the_users_configuration_gets_the_defaults(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    result = daemon.run("init", XDG_CONFIG_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert schema.load(tmp_path / "agentd" / "agentd.yaml", {}).model.path == "default"


def test_a_person_is_asked(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    talk = [("Model", "\n"), ("A task's name", "mood\n"), ("Its answers", "good, bad\n"), ("A task's name", "\n")]
    path = tmp_path / "agentd.yaml"
    code, screen = daemon.on_terminal("init", str(path), talk=[*talk, ("Memory", "1GiB\n")])
    assert code == 0, screen
    config = schema.load(path, {})
    assert config.tasks["mood"].choices == ("good", "bad")
    assert config.memory.limit == 1 << 30


def test_answers_come_from_a_pipe_as_well(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    path = tmp_path / "agentd.yaml"
    result = daemon.run("init", str(path), stdin="\nmood\ngood, bad\nnotes\n\n\n1GiB\n")
    assert result.returncode == 0, result.stderr
    assert "A task's name" not in result.stderr  # no one is there to read it
    config = schema.load(path, {})
    assert config.model.path == "default"
    assert {name: task.choices for name, task in config.tasks.items()} == {"mood": ("good", "bad"), "notes": ()}
    assert config.memory.limit == 1 << 30
    wrong = daemon.run("init", str(path), "--replace", stdin="\n\nplenty\n")
    assert (wrong.returncode, "memory.limit" in wrong.stderr) == (2, True)
    assert daemon.run("init", str(path), stdin="y\n").returncode == 5  # a line is no consent
    assert schema.load(path, {}).memory.limit == 1 << 30
    assert daemon.run("init", str(path), "-y", "--replace", stdin="/no/such/model\n").returncode == 0
    assert schema.load(path, {}).model.path == "default"


def test_nothing_is_overwritten_unless_that_is_said(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    path = tmp_path / "agentd.yaml"
    path.write_text("# mine\n")
    result = daemon.run("init", str(path), "-y")
    assert result.returncode == 5
    assert "--replace" in result.stderr
    code, _ = daemon.on_terminal("init", str(path), talk=[("is there already", "n\n")])
    assert code == 5
    assert path.read_text() == "# mine\n"
    result = daemon.run("init", str(path), "-y", "--replace")
    assert result.returncode == 0
    assert "agentd.yaml.bak" in result.stderr
    assert (tmp_path / "agentd.yaml.bak").read_text() == "# mine\n"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--memory", "3 bananas"], "memory.limit"),
        (["--task", "a=one"], "NAME=A,B"),
        (["--task", "=a,b"], "NAME=A,B"),
        (["--task", "a=x,x"], "tasks.a"),
        (["--model", "/no/such/model.gguf"], "/no/such/model.gguf"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    daemon: ScriptedDaemon, tmp_path: Path, options: list[str], named: str
) -> None:
    path = tmp_path / "agentd.yaml"
    path.write_text("# mine\n")
    result = daemon.run("init", str(path), "-y", "--replace", *options)
    assert result.returncode == 2
    assert named in result.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["agentd.yaml"]
    assert path.read_text() == "# mine\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_its_shell_reads(daemon: ScriptedDaemon, shell: str) -> None:
    script = daemon.run("completion", shell).stdout
    assert "_AGENTCTL_COMPLETE" in script
    if shutil.which(shell):
        flag = {"bash": "-n", "zsh": "-n", "fish": "--no-execute"}[shell]
        subprocess.run([shell, flag], input=script, text=True, check=True)


def test_bash_completes_commands_and_options(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    agentctl = tmp_path / "agentctl"
    agentctl.write_text(f'#!/bin/sh\nexec {" ".join(command([]))} "$@"\n')
    agentctl.chmod(0o755)

    def completed(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in words)
        script = (
            f'eval "$(agentctl completion bash)"; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1};'
            ' _agentctl_completion agentctl; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        environment = daemon.environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
        return set(done.stdout.split())

    assert {"review", "revisions", "replay"} <= completed("agentctl", "re")
    assert "import" in completed("agentctl", "feedback", "i")
    assert "--once" in completed("agentctl", "top", "--")


def test_a_shell_that_is_not_known_is_named(daemon: ScriptedDaemon) -> None:
    result = daemon.run("completion", "tcsh")
    assert result.returncode == 2
    assert "tcsh" in result.stderr
