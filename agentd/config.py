"""Typed settings from YAML and the environment. Every key has a default, a unit and a check.

All problems of a file are reported at once. `AGENTD_<SECTION>_<KEY>` in the environment overrides the file,
e.g. `AGENTD_STATE_DIR=/data/agentd`; nested sections join with underscores (`AGENTD_ADAPT_GATE_ALPHA=0.01`).
"""

import dataclasses
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from agentd import config_values as value
from agentd import methods, paths
from agentd.config_tasks import Task, declared
from agentd.errors import InvalidConfig

_MAX_SOCKET_PATH = 107  # sockaddr_un.sun_path less its terminating zero (unix(7))


def _key(default: Any, parse: Callable[[Any], Any], doc: str) -> Any:
    return field(default=default, metadata={"parse": parse, "doc": doc})


@dataclass(frozen=True)
class Model:
    path: str = _key(
        "default",
        str,
        "a GGUF file, `default` (SmolLM2-135M-Instruct), hf:OWNER/REPO/FILE.gguf; transformers: a directory, too; "
        "int8: a file",
    )
    context: int = _key(4096, value.number(256, 1 << 20, int), "tokens in the serving KV cache, shared by all slots")
    threads: int | str = _key("auto", value.auto(value.number(1, 1024, int)), "threads of the engine")
    gpu_layers: int | str = _key(
        "auto", value.auto(value.number(0, 10000, int)), "blocks offloaded to a GPU, where llama.cpp has one"
    )
    dtype: str = _key(
        "auto", value.one_of("auto", "float32", "bfloat16"), "engine transformers: what weights are served and learn in"
    )


@dataclass(frozen=True)
class Serve:
    socket: Path | None = _key(None, value.path, "UNIX socket of the API (mode 0660); the runtime directory's api.sock")
    admin_socket: Path | None = _key(None, value.path, "UNIX socket of the admin API (mode 0600); admin.sock beside it")
    slots: int = _key(4, value.number(1, 64, int), "requests answered at the same time; others wait")
    queue: int = _key(64, value.number(0, 10000, int), "requests that may wait for a slot; more get 503")
    tcp: str | None = _key(None, value.loopback, "a loopback HOST:PORT to serve the API on as well")
    max_body: int = _key(2**20, value.size, "bytes of a request body")
    max_import: int = _key(64 * 2**20, value.size, "bytes of a JSONL body of examples")
    max_tokens: int = _key(512, value.number(1, 1 << 20, int), "tokens of an answer when the request names no limit")


@dataclass(frozen=True)
class State:
    dir: Path = field(
        default_factory=paths.state_dir, metadata={"parse": value.path, "doc": "database, revisions, taps"}
    )


@dataclass(frozen=True)
class Memory:
    reserve: int = _key(256 * 2**20, value.size, "bytes that adaptation leaves free for the rest of the device")
    floor: int = _key(128 * 2**20, value.size, "bytes of free memory under which a running pass stops")
    limit: int | None = _key(None, value.size, "bytes that adaptation may take at the most")


@dataclass(frozen=True)
class Trigger:
    min_examples: int = _key(64, value.number(1, 10**9, int), "new training examples that start a pass")
    idle: float = _key(30.0, value.duration, "seconds without a request before a pass starts by itself")
    every: float = _key(0.0, value.duration, "seconds between passes by the clock, if there is anything new; 0 = off")
    check: float = _key(5.0, value.duration, "seconds between looks at whether a pass is due")
    quiet_hours: str | None = _key(None, value.quiet_hours, "local time in which no pass starts by itself")


@dataclass(frozen=True)
class Gate:
    alpha: float = _key(0.05, value.number(1e-9, 0.5), "significance level of the paired test on holdout")
    min_holdout: int = _key(20, value.number(1, 10**9, int), "holdout examples a task needs before it may be adapted")
    max_holdout: int = _key(400, value.number(1, 10**9, int), "holdout examples scored per task, the newest first")
    max_regression: float = _key(0.02, value.number(0, 1), "accuracy another task may lose")
    max_drift: float = _key(0.5, value.number(0, 100), "nats per token of KL divergence from the base on neutral text")


@dataclass(frozen=True)
class Trial:
    duration: float = _key(60.0, value.duration, "seconds a new revision serves on trial before it is committed")
    attempts: int = _key(3, value.number(1, 100, int), "restarts a trial survives before it is rolled back")
    max_latency: float = _key(
        2.0, value.number(1, 1000), "times the committed revision's time for a canary answer that a trial may take"
    )
    alpha: float = _key(
        0.01, value.number(1e-9, 0.5), "chance that a revision no worse than the last is taken back for its feedback"
    )


@dataclass(frozen=True)
class Hold:
    temperature: float | None = _key(
        90.0, value.number(20, 150), "°C of the hottest sensor above which no pass runs; null = off"
    )
    battery: float | None = _key(25.0, value.number(0, 100), "percent under which no pass runs on battery; null = off")


@dataclass(frozen=True)
class Adapt:
    enabled: bool = _key(True, value.boolean, "whether passes start by themselves; `agentctl adapt` always may")
    method: str = _key("auto", value.one_of(*methods.NAMES), "the learning method; those that an engine has differ")
    blocks: int | str = _key(
        "auto", value.auto(value.number(0, 10000, int)), "k, the number of last blocks trained by backpropagation"
    )
    rank: int = _key(8, value.number(1, 256, int), "rank of the LoRA matrices")
    max_examples: int = _key(1024, value.number(1, 10**9, int), "training examples of one pass, replayed ones included")
    zo_steps: int | str = _key("auto", value.auto(value.number(0, 10**6, int)), "zeroth-order steps of a pass")
    seed: int = _key(0, value.number(0, 2**63 - 1, int), "seed of everything random in a pass")
    trigger: Trigger = field(default_factory=Trigger)
    gate: Gate = field(default_factory=Gate)
    trial: Trial = field(default_factory=Trial)
    hold: Hold = field(default_factory=Hold)


@dataclass(frozen=True)
class Feedback:
    weight_human: float = _key(
        1.0, value.number(0, 1), "how far labels and demonstrations of source human are believed"
    )
    weight_program: float = _key(0.8, value.number(0, 1), "the same for source program")
    weight_implicit: float = _key(
        0.5, value.number(0, 1), "the same for source implicit; 0 keeps all of it in quarantine"
    )
    limit: int = _key(
        600,
        value.number(1, 10**9, int),
        "pieces of feedback to learn from, a minute of one source; what exceeds it is quarantined",
    )
    max_quarantined: int = _key(
        10_000, value.number(1, 10**9, int), "pieces kept in quarantine per source; more get 429"
    )

    @property
    def weights(self) -> dict[str, float]:
        return {"human": self.weight_human, "program": self.weight_program, "implicit": self.weight_implicit}


@dataclass(frozen=True)
class Retention:
    inferences: float = _key(90 * 86400.0, value.duration, "seconds a served request without feedback is kept")
    passes: int = _key(20, value.number(1, 10**6, int), "working directories of past passes kept for inspection")


@dataclass(frozen=True)
class Config:
    model: Model = field(default_factory=Model)
    engine: str = _key(
        "llamacpp",
        value.one_of("llamacpp", "transformers", "int8"),
        "what serves the model; transformers: torch, whose weights learn in place; int8: a small integer classifier",
    )
    serve: Serve = field(default_factory=Serve)
    state: State = field(default_factory=State)
    memory: Memory = field(default_factory=Memory)
    adapt: Adapt = field(default_factory=Adapt)
    feedback: Feedback = field(default_factory=Feedback)
    retention: Retention = field(default_factory=Retention)
    tasks: dict[str, Task] = field(default_factory=dict, metadata={"doc": "name: {choices, metric, prompt}"})

    @property
    def api_socket(self) -> Path:
        return self.serve.socket or paths.runtime_dir(self.state.dir) / "api.sock"

    @property
    def admin_socket(self) -> Path:
        return self.serve.admin_socket or self.api_socket.with_name("admin.sock")

    @property
    def model_threads(self) -> int:
        """Threads for the engine: the cores this process may use; one for a small integer network, whose layers take
        less time than waking another thread does."""
        if self.model.threads == "auto":
            return 1 if self.engine == "int8" else len(os.sched_getaffinity(0))
        return int(self.model.threads)


def load(path: Path | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """Reads `path` (or takes the defaults) and the environment. Raises InvalidConfig with every problem found."""
    tree: Any = {}
    source: object = path or "the environment"
    if path is not None:
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise InvalidConfig(path, [f"cannot read it: {error.strerror}"]) from None
        except yaml.YAMLError as error:
            raise InvalidConfig(path, [f"not valid YAML: {' '.join(str(error).split())}"]) from None
        if not isinstance(tree, dict):
            raise InvalidConfig(path, ["the file must hold a mapping of sections"])
    problems: list[str] = []
    config: Config = _build(Config, tree, "", environment, problems)
    for name, socket in (("serve.socket", config.api_socket), ("serve.admin_socket", config.admin_socket)):
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
            problems.append(f"{name}: {socket} is longer than the {_MAX_SOCKET_PATH} bytes a socket path may have")
    if config.engine == "int8" and config.model.path == "default":
        problems.append("model.path: engine int8 needs the file of a classifier (docs/int8.md)")
    known = methods.OF_ENGINE[config.engine]
    if config.adapt.method not in ("auto", *known):
        problems.append(
            f"adapt.method: engine {config.engine} has no {config.adapt.method!r}; it has auto, {', '.join(known)}"
        )
    if config.api_socket == config.admin_socket:
        problems.append("serve.admin_socket: must differ from serve.socket")
    if problems:
        raise InvalidConfig(source, problems)
    return config


def _build(cls: Any, tree: Any, prefix: str, environment: Mapping[str, str], problems: list[str]) -> Any:
    if not isinstance(tree, dict):
        problems.append(f"{prefix.rstrip('.') or 'file'}: must be a mapping, not {tree!r}")
        tree = {}
    known = {f.name: f for f in fields(cls)}
    for name in tree:
        if name not in known:
            problems.append(f"{prefix}{name}: unknown key; known here: {', '.join(known)}")
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for name, spec in known.items():
        where = f"{prefix}{name}"
        if is_dataclass(hints[name]):
            values[name] = _build(hints[name], tree.get(name) or {}, f"{where}.", environment, problems)
            continue
        if where == "tasks":
            values[name] = declared(tree.get(name) or {}, problems)
            continue
        raw = environment.get("AGENTD_" + where.upper().replace(".", "_"), tree.get(name, dataclasses.MISSING))
        if raw is dataclasses.MISSING:
            continue
        if raw is None or raw == "null":
            if _optional(hints[name]):
                values[name] = None
            else:
                problems.append(f"{where}: must not be empty")
            continue
        try:
            values[name] = spec.metadata["parse"](raw)
        except (ValueError, TypeError) as error:
            problems.append(f"{where}: {error}")
    return cls(**values)


def _optional(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def as_tree(config: Any) -> dict[str, Any]:
    """The effective configuration as plain data, for `agentd config` and the manifest of a pass."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, Path) else value

    tree: dict[str, Any] = plain(config)
    return tree


def reference(cls: Any = Config, prefix: str = "") -> list[tuple[str, Any, str]]:
    """Every key as (name, default, what it means), for `agentd config --reference` and docs/."""
    rows: list[tuple[str, Any, str]] = []
    hints = typing.get_type_hints(cls)
    for spec in fields(cls):
        if is_dataclass(hints[spec.name]):
            rows += reference(hints[spec.name], f"{prefix}{spec.name}.")
        else:
            default = spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default
            rows.append((prefix + spec.name, default, spec.metadata["doc"]))
    return rows
