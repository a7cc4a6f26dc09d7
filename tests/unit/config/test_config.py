import itertools
import re
from pathlib import Path

import pytest
import yaml

from agentd.config import schema
from agentd.config.values import is_loopback
from agentd.errors import InvalidConfig

CONFIGS = Path(__file__).parents[3] / "configs"


def load(tmp_path: Path, text: str, **environment: str) -> schema.Config:
    path = tmp_path / "agentd.yaml"
    path.write_text(text)
    return schema.load(path, environment)


def problems(tmp_path: Path, text: str, **environment: str) -> list[str]:
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path, text, **environment)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_the_shipped_configuration_is_the_defaults() -> None:
    assert schema.load(CONFIGS / "agentd.yaml", {}) == schema.load(None, {}) == schema.Config()


def test_the_shipped_configuration_names_every_key() -> None:
    text = (CONFIGS / "agentd.yaml").read_text()
    tree = yaml.safe_load(text)
    for name, _, _ in schema.reference():
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
    task = schema.load(CONFIGS / "reviews.yaml", {}).tasks["reviews"]
    assert task.choices == ("yes", "no")
    assert task.metric == "accuracy"
    assert task.prompt == ("Did the reviewer like this movie? Answer yes or no.\n\n{text}")


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = """
        model: {context: 10, treads: 2}
        serve: {tcp: "example.org:80"}
        adapt: {gate: {alpha: 2}, trigger: {quiet_hours: 25:00-07:00}, method: magic, enabled: 1}
        memory: {reserve: lots}
        engine: null
        colour: red
    """
    lines = problems(tmp_path, text)
    assert {problem.split(":")[0] for problem in lines} == {
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
    assert len(lines) == 10


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
        schema.load(tmp_path / "absent.yaml", {})


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == schema.Config()
    assert load(tmp_path, "model:\nserve:\ntasks:\nadapt: {gate: }\n") == schema.Config()
    assert load(tmp_path, "tasks: {t: {choices: }}").tasks == {"t": schema.TaskSettings()}


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


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:80", True),
        ("127.9.9.9:65535", True),
        ("localhost:80", True),
        ("[::1]:80", True),
        ("0.0.0.0:80", False),
        ("[::]:80", False),
        ("192.168.1.5:11434", False),
        ("[fe80::1]:80", False),
    ],
)
def test_addresses(tmp_path: Path, address: str, loopback: bool) -> None:
    assert load(tmp_path, f"serve: {{tcp: '{address}'}}").serve.tcp == address
    assert is_loopback(address) == loopback


@pytest.mark.parametrize(
    "address", ["80", ":80", "example.org:80", "127.0.0.1", "1.2.3:80", "::1:80", "[127.0.0.1]:80", "0.0.0.0:0", "*:80"]
)
def test_no_addresses(tmp_path: Path, address: str) -> None:
    (problem,) = problems(tmp_path, f"serve: {{tcp: '{address}'}}")
    assert problem.startswith("serve.tcp: ")


def test_origins_of_web_pages(tmp_path: Path) -> None:
    origins = load(tmp_path, "serve: {origins: ['https://Chat.example:3000']}").serve.origins
    assert origins == ("https://chat.example:3000",)
    # as browsers send them: without the scheme's own port; apps in a web view and extensions have schemes of their own
    named = "['http://a.example:80', 'https://a.example:443', 'https://a.example:80', 'capacitor://localhost']"
    expected = ("http://a.example", "https://a.example", "https://a.example:80", "capacitor://localhost")
    assert load(tmp_path, f"serve: {{origins: {named}}}").serve.origins == expected
    for wrong in ("*", "chat.example", "https://chat.example/", "https://*.example", "null"):
        (problem,) = problems(tmp_path, f"serve: {{origins: ['{wrong}']}}")
        assert problem.startswith("serve.origins: ")


def test_a_certificate_goes_with_its_key(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "serve: {tls: {certificate: /etc/agentd/tls.crt}}")
    assert problem == "serve.tls: certificate and key go together"
    settings = load(tmp_path, "", AGENTD_SERVE_TLS_CERTIFICATE="/a", AGENTD_SERVE_TLS_KEY="/b").serve.tls
    assert (settings.certificate, settings.key) == (Path("/a"), Path("/b"))


@pytest.mark.parametrize("span", ["00:00-00:00", "22:00-22:00", "24:00-07:00", "22-07"])
def test_no_quiet_hours(tmp_path: Path, span: str) -> None:
    (problem,) = problems(tmp_path, f"adapt: {{trigger: {{quiet_hours: '{span}'}}}}")
    assert problem.startswith("adapt.trigger.quiet_hours: ")


@pytest.mark.parametrize("written", ["-1", "5 parsecs", "1e9x", "true", "[]", "MiB"])
def test_no_quantity(tmp_path: Path, written: str) -> None:
    lines = problems(tmp_path, f"memory: {{reserve: {written}}}\nretention: {{inferences: {written}}}")
    assert [problem.split(":")[0] for problem in lines] == ["memory.reserve", "retention.inferences"]


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
    lines = problems(tmp_path, "model: {threads: 0}", AGENTD_ADAPT_RANK="many")
    assert [problem.split(":")[0] for problem in lines] == ["model.threads", "adapt.rank"]


def test_a_socket_path_may_be_107_bytes(tmp_path: Path) -> None:
    fits = "/" + "s" * 106
    # the admin socket, beside it, is shorter
    assert load(tmp_path, f"serve: {{socket: {fits}}}").api_socket == Path(fits)
    lines = problems(tmp_path, f"serve: {{socket: {fits}s, admin_socket: /run/admin.sock}}")
    assert lines == [f"serve.socket: {fits}s is longer than the 107 bytes a socket path may have"]
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
        ("{choices: [12:30, 010]}", "quote it"),
        ('{choices: ["\u00e9", "e\u0301"]}', "two or more different texts"),
        ('{choices: ["a", "a\u202c"]}', "two or more different texts"),
        ('{choices: ["a", " "]}', "two or more different texts"),
        ("{choices: [a, 1_000]}", "1000"),
        ("{choices: [a, null]}", "None"),
        ("{choices: [2024-01-01, b]}", "datetime.date(2024, 1, 1)"),
        ("{choices: a}", "a valid tuple"),
        ("{metric: accuracy}", "needs choices"),
        ("{choices: [a, b], metric: f1}", "should be 'auto', 'accuracy', 'exact', 'call', 'json' or 'loss'"),
        ("{choices: [a, b], metric: call}", "is for free text and calls"),
        ("{prompt: no place for the input}", "must contain {text}"),
        ("{colour: red}", "unknown key"),
        ("7", "must be a mapping"),
    ],
)
def test_a_task_with_a_mistake(tmp_path: Path, task: str, message: str) -> None:
    (problem,) = problems(tmp_path, f"tasks: {{t: {task}}}")
    assert problem.startswith("tasks.t")
    assert message in problem


@pytest.mark.parametrize("method", ["", ", method: mezo"])
def test_a_metric_is_learned_by_forward_passes(tmp_path: Path, method: str) -> None:
    assert load(tmp_path, f"adapt: {{objective: metric{method}}}").adapt.objective == "metric"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapt: {objective: metric, method: suffix-bp}", "by which suffix-bp (adapt.method) learns"),
        ("engine: int8\nmodel: {path: a.safetensors}\nadapt: {objective: metric}", "learns by likelihood alone"),
    ],
)
def test_a_metric_has_no_derivative(tmp_path: Path, text: str, message: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.startswith("adapt.objective: ")
    assert message in problem


def test_free_text_tasks_are_measured_by_loss(tmp_path: Path) -> None:
    assert load(tmp_path, "tasks: {notes: {prompt: 'Summarise: {text}'}, plain: }").tasks == {
        "notes": schema.TaskSettings(prompt="Summarise: {text}"),
        "plain": schema.TaskSettings(),
    }


def test_the_name_of_a_task_is_a_text(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "tasks: {010: {}}")
    assert problem == "tasks.8: YAML reads this as 8, which is no text; quote it"
    assert load(tmp_path, "tasks: {'010': {choices: ['12:30', '010', '1_000', 'null', '2024-01-01']}}").tasks["010"]


@pytest.mark.parametrize("written", ["0", "lots", "true", "null", "2.5", "[1]"])
def test_what_is_neither_a_number_nor_auto(tmp_path: Path, written: str) -> None:
    (problem,) = problems(tmp_path, f"model: {{threads: {written}}}")
    assert problem.startswith("model.threads: ")
    assert "should be 'auto'" in problem


def test_the_effective_configuration_loads_again(tmp_path: Path) -> None:
    settings = load(tmp_path, (CONFIGS / "reviews.yaml").read_text(), AGENTD_ADAPT_TRIGGER_IDLE="5m")
    assert load(tmp_path, yaml.safe_dump(settings.model_dump(mode="json"))) == settings


def test_every_key_says_what_it_means() -> None:
    rows = list(schema.reference())
    assert len(rows) > 30
    assert all(meaning for _, _, meaning in rows)
