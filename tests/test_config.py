import itertools
import re
from pathlib import Path

import pytest
import yaml

from agentd import config
from agentd.config_tasks import Task
from agentd.errors import InvalidConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def load(tmp_path: Path, text: str, **environment: str) -> config.Config:
    path = tmp_path / "agentd.yaml"
    path.write_text(text)
    return config.load(path, environment)


def problems(tmp_path: Path, text: str, **environment: str) -> list[str]:
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path, text, **environment)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_the_shipped_configuration_is_the_defaults() -> None:
    assert config.load(CONFIGS / "agentd.yaml", {}) == config.load(None, {}) == config.Config()


def test_the_shipped_configuration_names_every_key() -> None:
    text = (CONFIGS / "agentd.yaml").read_text()
    tree = yaml.safe_load(text)
    for name, _, _ in config.reference():
        if name == "state.dir":  # its default depends on the user, so it is shown in a comment
            assert re.search(r"^state:\n(  #.*\n)*  # dir: ", text, re.MULTILINE)
            continue
        node = tree
        for part in name.split("."):
            assert part in node, name
            node = node[part]


def test_every_key_of_the_shipped_configuration_is_commented() -> None:
    lines = (CONFIGS / "agentd.yaml").read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if re.match(r"\s*\w+: \S", line):
            assert above.lstrip().startswith("#"), line


def test_the_example_declares_its_task() -> None:
    task = config.load(CONFIGS / "reviews.yaml", {}).tasks["reviews"]
    assert task.choices == ("yes", "no")
    assert task.metric == "accuracy"
    assert task.prompt == ("Did the reviewer like this movie? Answer yes or no.\n\n{text}")


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = """
        model: {context: 10, treads: 2}
        serve: {tcp: "0.0.0.0:80"}
        adapt: {gate: {alpha: 2}, trigger: {quiet_hours: 25:00-07:00}, method: magic, enabled: 1}
        memory: {reserve: lots}
        engine: null
        colour: red
    """
    found = problems(tmp_path, text)
    assert {problem.split(":")[0] for problem in found} == {
        "model.context",
        "model.treads",
        "serve.tcp",
        "adapt.gate.alpha",
        "adapt.trigger.quiet_hours",
        "adapt.method",
        "adapt.enabled",
        "memory.reserve",
        "engine",
        "colour",
    }
    assert len(found) == 10


def test_an_unknown_key_is_named_with_the_known_ones(tmp_path: Path) -> None:
    assert problems(tmp_path, "memory: {reserv: 1}") == [
        "memory.reserv: unknown key; known here: reserve, floor, limit"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1", "not valid YAML"),
        ("just a text", "must hold a mapping"),
        ("model: 5", "model: must be a mapping, not 5"),
        ("tasks: [a]", "tasks: must be a mapping"),
    ],
)
def test_a_file_of_another_shape(tmp_path: Path, text: str, message: str) -> None:
    assert message in problems(tmp_path, text)[0]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="cannot read it: No such file"):
        config.load(tmp_path / "absent.yaml", {})


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == config.Config()
    assert load(tmp_path, "model:\nserve:\n") == config.Config()


@pytest.mark.parametrize(
    ("written", "size"),
    [("0", 0), ("4096", 4096), ("1KiB", 1024), ("1.5GiB", 3 * 2**29), ("256MiB", 2**28), ("2 MB", 2 * 10**6)],
)
def test_sizes(tmp_path: Path, written: str, size: int) -> None:
    assert load(tmp_path, f"memory: {{reserve: {written}}}").memory.reserve == size


@pytest.mark.parametrize(
    ("written", "seconds"), [("0", 0), ("45", 45), ("500ms", 0.5), ("5m", 300), ("1.5h", 5400), ("90d", 7776000)]
)
def test_durations(tmp_path: Path, written: str, seconds: float) -> None:
    assert load(tmp_path, f"adapt: {{trigger: {{idle: {written}}}}}").adapt.trigger.idle == seconds


@pytest.mark.parametrize("written", ["-1", "5 parsecs", "1e9x", "true", "[]", "MiB"])
def test_no_quantity(tmp_path: Path, written: str) -> None:
    found = problems(tmp_path, f"memory: {{reserve: {written}}}\nretention: {{inferences: {written}}}")
    assert [problem.split(":")[0] for problem in found] == ["memory.reserve", "retention.inferences"]


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "model: {context: 512}\nmemory: {limit: 1GiB}",
        AGENTD_MODEL_CONTEXT="1024",
        AGENTD_MEMORY_LIMIT="null",
        AGENTD_ADAPT_GATE_ALPHA="0.01",
        AGENTD_ADAPT_ENABLED="false",
        AGENTD_STATE_DIR="$HOME/../elsewhere",
        AGENTD_SOCKET="/not/a/setting/of/the/daemon",
    )
    assert settings.model.context == 1024
    assert settings.memory.limit is None
    assert settings.adapt.gate.alpha == 0.01
    assert settings.adapt.enabled is False
    assert settings.state.dir == Path.home() / ".." / "elsewhere"
    assert settings.serve.socket is None


def test_a_mistake_in_the_environment_is_reported_like_one_in_the_file(tmp_path: Path) -> None:
    found = problems(tmp_path, "model: {threads: 0}", AGENTD_ADAPT_RANK="many")
    assert [problem.split(":")[0] for problem in found] == ["model.threads", "adapt.rank"]


def test_a_socket_path_may_be_107_bytes(tmp_path: Path) -> None:
    fits = "/" + "s" * 106
    # the admin socket, beside it, is shorter
    assert load(tmp_path, f"serve: {{socket: {fits}}}").api_socket == Path(fits)
    found = problems(tmp_path, f"serve: {{socket: {fits}s, admin_socket: /run/admin.sock}}")
    assert found == [f"serve.socket: {fits}s is longer than the 107 bytes a socket path may have"]
    umlauts = "/" + "ü" * 54  # 109 bytes, 55 characters
    assert "107 bytes" in problems(tmp_path, f"serve: {{admin_socket: {umlauts}}}")[0]


def test_the_two_sockets_must_differ(tmp_path: Path) -> None:
    assert "must differ" in problems(tmp_path, "serve: {socket: /run/a.sock, admin_socket: /run/a.sock}")[0]


def test_sockets_lie_side_by_side(tmp_path: Path) -> None:
    settings = load(tmp_path, "serve: {socket: /run/here/api.sock}")
    assert settings.admin_socket == Path("/run/here/admin.sock")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{choices: [a]}", "two or more"),
        ("{choices: [yes, no]}", "quote it"),
        ("{choices: [a, a]}", "two or more"),
        ("{choices: a}", "two or more"),
        ("{metric: accuracy}", "needs choices"),
        ("{choices: [a, b], metric: f1}", "is not one of accuracy"),
        ("{prompt: no place for the input}", "must contain {text}"),
        ("{colour: red}", "unknown key"),
        ("7", "must be a mapping"),
    ],
)
def test_a_task_with_a_mistake(tmp_path: Path, task: str, message: str) -> None:
    (problem,) = problems(tmp_path, f"tasks: {{t: {task}}}")
    assert problem.startswith("tasks.t")
    assert message in problem


def test_free_text_tasks_are_measured_by_loss(tmp_path: Path) -> None:
    assert load(tmp_path, "tasks: {notes: {prompt: 'Summarise: {text}'}, plain: }").tasks == {
        "notes": Task((), "loss", "Summarise: {text}"),
        "plain": Task((), "loss", None),
    }


def test_the_effective_configuration_loads_again(tmp_path: Path) -> None:
    settings = load(tmp_path, (CONFIGS / "reviews.yaml").read_text(), AGENTD_ADAPT_TRIGGER_IDLE="5m")
    assert load(tmp_path, yaml.safe_dump(config.as_tree(settings))) == settings


def test_every_key_says_what_it_means() -> None:
    rows = config.reference()
    assert len(rows) > 30
    assert all(meaning for _, _, meaning in rows)
