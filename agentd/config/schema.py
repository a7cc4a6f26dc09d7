"""Typed settings from YAML and the environment. Every key has a default, a unit and a check.

All problems of a file are reported at once. `AGENTD_<SECTION>_<KEY>` in the environment overrides the file,
e.g. `AGENTD_STATE_DIR=/data/agentd`; nested sections join with underscores (`AGENTD_ADAPT_GATE_ALPHA=0.01`).
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails

from agentd import methods
from agentd.config import paths
from agentd.config.values import (
    Address,
    Boolean,
    Duration,
    File,
    Integer,
    Names,
    Number,
    Origins,
    QuietHours,
    Shares,
    Size,
    Switch,
    Text,
    Url,
)
from agentd.errors import InvalidConfig
from agentd.host import cpu
from agentd.learn.labels import normal_label

_MAX_SOCKET_PATH = 107  # sockaddr_un.sun_path less its terminating zero (unix(7))
_MAX_COUNT = 10**9

Metric = Literal["auto", "accuracy", "exact", "call", "json", "loss"]


def key(default: Any, meaning: str, **bounds: Any) -> Any:
    return Field(default, description=meaning, **bounds)


class Section(BaseModel):
    """One mapping of the file; an empty one means the defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, tree: Any) -> Any:
        return {} if tree is None else tree


class ModelSettings(Section):
    path: Text = key(
        "default",
        "a GGUF file, `default` (SmolLM2-135M-Instruct), hf:OWNER/REPO/FILE.gguf; transformers: a "
        "directory, too; int8: a file",
    )
    context: Annotated[Integer, Field(ge=256, le=1 << 20)] | Literal["auto"] = key(
        "auto", "tokens that one request may use, prompt and answer; auto: what the model was trained for, if it fits"
    )
    threads: Annotated[Integer, Field(ge=1, le=1024)] | Literal["auto"] = key("auto", "threads of the engine")
    gpu_layers: Annotated[Integer, Field(ge=0, le=10000)] | Literal["auto"] = key(
        "auto", "blocks offloaded to a GPU, where llama.cpp has one"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "engine transformers: what weights are served and learn in"
    )


class PrefixSettings(Section):
    memory: Size = key(
        128 * 2**20, "bytes of memory for what prompts begin with, beyond slots; an eighth of what is free at the most"
    )
    disk: Size = key(2**30, "bytes of files for the same, which survive a restart; 0 = none")


class TlsSettings(Section):
    certificate: File | None = key(None, "PEM file of the certificate, and those above it, for serve.tcp; null: no TLS")
    key: File | None = key(None, "PEM file of its private key, without a password")


class TelemetrySettings(Section):
    endpoint: Url | None = key(
        None, "an OpenTelemetry collector (OTLP over HTTP), such as http://127.0.0.1:4318; null: nothing is sent"
    )


class ServeSettings(Section):
    socket: File | None = key(None, "UNIX socket of the API (mode 0660); the runtime directory's api.sock")
    admin_socket: File | None = key(None, "UNIX socket of the admin API (mode 0600); admin.sock beside it")
    slots: Integer = key(4, "requests answered at the same time; others wait", ge=1, le=64)
    queue: Integer = key(64, "requests that may wait for a slot; more get 503", ge=0, le=10000)
    tcp: Address | None = key(
        None, "HOST:PORT to serve the API on as well; any but a loopback one asks for API keys (agentctl key add)"
    )
    require_key: Boolean = key(False, "ask for an API key on a loopback serve.tcp, too")
    tls: TlsSettings = TlsSettings()
    origins: Origins = key((), "web pages, such as https://chat.example, that may use serve.tcp from a browser")
    max_body: Size = key(2**20, "bytes of a request body")
    max_import: Size = key(64 * 2**20, "bytes of a JSONL body of examples")
    strict: bool = key(False, "refuse unknown fields of chat and completion requests; they are ignored otherwise")
    prefixes: PrefixSettings = PrefixSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    aliases: Names = key((), "names besides `default` and its own under which clients may ask for the model")
    max_tokens: Integer = key(512, "tokens of an answer when the request names no limit", ge=1, le=1 << 20)


class StateSettings(Section):
    dir: File = Field(default_factory=paths.state_dir, description="database, revisions, taps")


class MemorySettings(Section):
    reserve: Size = key(256 * 2**20, "bytes that adaptation leaves free for the rest of the device")
    floor: Size = key(128 * 2**20, "bytes of free memory under which a running pass stops")
    limit: Size | None = key(None, "bytes that adaptation may take at most")


class TriggerSettings(Section):
    min_examples: Integer = key(64, "new training examples that start a pass", ge=1, le=_MAX_COUNT)
    idle: Duration = key(30.0, "seconds without a request before a pass starts by itself")
    latest: Duration = key(86400.0, "seconds after which a pass that is due starts though requests keep coming")
    every: Duration = key(0.0, "seconds between passes by the clock, if there is anything new; 0 = off")
    check: Duration = key(5.0, "seconds between looks at whether a pass is due")
    quiet_hours: QuietHours | None = key(None, "local time in which no pass starts by itself")


class GateSettings(Section):
    alpha: Number = key(0.05, "significance level of the paired test on holdout", ge=1e-9, le=0.5)
    min_holdout: Integer = key(20, "holdout examples a task needs before it may be adapted", ge=1, le=_MAX_COUNT)
    max_holdout: Integer = key(400, "holdout examples scored per task, the newest first", ge=1, le=_MAX_COUNT)
    max_regression: Number = key(0.02, "accuracy another task may lose", ge=0, le=1)
    max_time: Duration = key(600.0, "seconds of a pass to have its holdout answered, and as many to have it scored")
    max_drift: Number = key(0.5, "nats per token of KL divergence from the base on neutral text", ge=0, le=100)
    max_skill_loss: Number = key(
        0.05, "share of the base's score in a group of skills that may be lost; 1 = not looked at", ge=0, le=1
    )


class TrialSettings(Section):
    duration: Duration = key(60.0, "seconds a new revision serves on trial before it is committed")
    attempts: Integer = key(3, "restarts a trial survives before it is rolled back", ge=1, le=100)
    max_latency: Number = key(
        2.0, "times the committed revision's time for a canary answer that a trial may take", ge=1, le=1000
    )
    alpha: Number = key(
        0.01, "chance that a revision no worse than the last is taken back for its feedback", ge=1e-9, le=0.5
    )


class ConsolidateSettings(Section):
    depth: Integer = key(
        8,
        "passes on each other after which the next one learns everything again from the base; 0: none does by itself",
        ge=0,
        le=10**6,
    )
    drift: Number = key(0.6, "share of adapt.gate.max_drift from which on it does, too", ge=0, le=1)
    max_examples: Integer = key(
        4096, "training examples that it learns from, as far as memory allows", ge=1, le=_MAX_COUNT
    )


class HoldSettings(Section):
    temperature: Annotated[Number, Field(ge=20, le=150)] | None = key(
        90.0, "°C of the hottest sensor above which no pass runs; null = off"
    )
    sensor: Text | None = key(None, "the one sensor that counts, as `agentctl doctor` calls it; null: the processor's")
    battery: Annotated[Number, Field(ge=0, le=100)] | None = key(
        25.0, "percent under which no pass runs on battery; null = off"
    )


class AdaptSettings(Section):
    enabled: Boolean = key(True, "whether passes start by themselves; `agentctl adapt` always may")
    method: methods.Method = key("auto", "the learning method; those that an engine has differ")
    blocks: Annotated[Integer, Field(ge=0, le=10000)] | Literal["auto"] = key(
        "auto", "k, the number of last blocks trained by backpropagation"
    )
    objective: methods.Objective = key(
        "likelihood",
        "what a pass raises: the likelihood of right answers, or metric, the share of them that is right. Metric has "
        "no gradient, so it is learned by zeroth-order methods alone",
    )
    rank: Integer = key(8, "rank of the LoRA matrices", ge=1, le=256)
    max_examples: Integer = key(1024, "training examples of one pass, replayed ones included", ge=1, le=_MAX_COUNT)
    zo_steps: Annotated[Integer, Field(ge=0, le=10**6)] | Literal["auto"] = key("auto", "zeroth-order steps of a pass")
    max_time: Duration = key(
        14400.0, "seconds from a pass's start to the end of its training; what is learned by then is judged", ge=10
    )
    seed: Integer = key(0, "seed of everything random in a pass", ge=0, le=2**63 - 1)
    recall: Switch = key(
        "auto", "put past corrections of a task into its prompts: off, on, or auto, where that was shown to help"
    )
    recall_tokens: Integer = key(512, "tokens that these may make a prompt longer", ge=16, le=1 << 20)
    trigger: TriggerSettings = TriggerSettings()
    gate: GateSettings = GateSettings()
    trial: TrialSettings = TrialSettings()
    hold: HoldSettings = HoldSettings()
    consolidate: ConsolidateSettings = ConsolidateSettings()


class FeedbackSettings(Section):
    weight_human: Number = key(1.0, "how far labels and demonstrations of source human are believed", ge=0, le=1)
    weight_program: Number = key(0.8, "the same for source program", ge=0, le=1)
    weight_implicit: Number = key(0.5, "the same for source implicit; 0 keeps all of it in quarantine", ge=0, le=1)
    implicit: bool = key(False, "take a tool's error, or a question asked again, for feedback on the answer before it")
    limit: Integer = key(
        600,
        "pieces of feedback to learn from, a minute of one source; what exceeds it is quarantined",
        ge=1,
        le=_MAX_COUNT,
    )
    max_quarantined: Integer = key(10_000, "pieces kept in quarantine per source; more get 429", ge=1, le=_MAX_COUNT)

    @property
    def weights(self) -> dict[str, float]:
        return {"human": self.weight_human, "program": self.weight_program, "implicit": self.weight_implicit}


class RetentionSettings(Section):
    inferences: Duration = key(90 * 86400.0, "seconds a served request without feedback is kept")
    passes: Integer = key(20, "working directories of past passes kept for inspection", ge=1, le=10**6)


class FleetSettings(Section):
    name: Text | None = key(
        None, "the fleet that this board learns together with (docs/fleet.md); null: none, and none is answered"
    )
    send: Shares = key((), "what may leave the board for it: ledger, adapter, figures")
    clip: Annotated[Number, Field(gt=0, le=1e6)] | None = key(
        None, "norm that the steps of one round's ledger are scaled down to, as a whole; null: as they are"
    )
    noise: Number = key(
        0.0, "standard deviation of the Gaussian noise on each of these steps, in units of fleet.clip", ge=0, le=1e4
    )
    delta: Number = key(1e-5, "chance that the privacy loss exceeds the ε that is stated", ge=1e-15, le=0.1)
    max_epsilon: Annotated[Number, Field(gt=0, le=1e6)] | None = key(
        None, "ε from which on nothing more is sent; null: no limit"
    )


class TaskSettings(Section):
    """A task. `choices` empty: answers are free text or calls. `metric` auto: accuracy with choices, call as soon as
    there are examples with calls, else loss. `recall` null: as adapt.recall says."""

    choices: Annotated[tuple[Text, ...], BeforeValidator(lambda value: () if value is None else value)] = ()
    metric: Metric = Field(default_factory=lambda values: "accuracy" if values.get("choices") else "auto")
    prompt: Text | None = None
    recall: Switch | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "TaskSettings":
        seen = {normal_label(choice) for choice in self.choices}
        if len(self.choices) == 1 or "" in seen or len(seen) < len(self.choices):
            raise ValueError("choices must be a list of two or more different texts, or empty")
        if self.metric == "accuracy" and not self.choices:
            raise ValueError("metric accuracy needs choices; free text is judged by exact, call, json or loss")
        if self.metric in ("exact", "call", "json") and self.choices:
            raise ValueError(f"metric {self.metric} is for free text and calls; choices have accuracy or loss")
        if self.prompt is not None and "{text}" not in self.prompt:
            raise ValueError("prompt must contain {text}, where the input goes")
        return self


class Config(Section):
    model: ModelSettings = ModelSettings()
    engine: Literal["llamacpp", "transformers", "int8"] = key(
        "llamacpp",
        "what serves the model; transformers: torch, whose weights learn in place; int8: a small integer classifier",
    )
    serve: ServeSettings = ServeSettings()
    state: StateSettings = Field(default_factory=StateSettings)
    memory: MemorySettings = MemorySettings()
    adapt: AdaptSettings = AdaptSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    retention: RetentionSettings = RetentionSettings()
    fleet: FleetSettings = FleetSettings()
    tasks: Annotated[dict[Text, TaskSettings], BeforeValidator(lambda value: {} if value is None else value)] = key(
        {}, "name: {choices, metric, prompt, recall}"
    )

    @property
    def api_socket(self) -> Path:
        return self.serve.socket or paths.runtime_dir(self.state.dir) / "api.sock"

    @property
    def admin_socket(self) -> Path:
        return self.serve.admin_socket or self.api_socket.with_name("admin.sock")

    _fitted_context: int = PrivateAttr(4096)  # until the model is known

    @property
    def context(self) -> int:
        """Tokens that one request may use."""
        return self._fitted_context if self.model.context == "auto" else self.model.context

    def fitted(self, context: int) -> "Config":
        """The same, with the tokens of one request where they are left to the machine."""
        config = self.model_copy()
        config._fitted_context = context
        return config

    @property
    def model_threads(self) -> int:
        """Threads for the engine: by default the cores that this process may use."""
        if self.model.threads == "auto":
            return cpu.cores()
        return self.model.threads


def load(path: Path | None = None, environment: Mapping[str, str] = os.environ) -> Config:
    """Reads `path` (or takes the defaults) and the environment. Raises InvalidConfig with every problem in them."""
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise InvalidConfig(path, [f"cannot read it: {error.strerror}"]) from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date such as 2024-13-01
            raise InvalidConfig(path, [f"not valid YAML: {' '.join(str(error).split())}"]) from None
        if not isinstance(tree, dict):
            raise InvalidConfig(path, ["the file must hold a mapping of sections"])
    _override(tree, Config, "AGENTD", environment)
    problems: dict[str, str] = {}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        for keys, detail in [(_keys(tree, detail["loc"]), detail) for detail in error.errors()]:
            if detail["type"] == "default_factory_not_called":  # the default hangs on a key that is wrong
                continue
            where, message = ".".join(map(str, keys)), _message(keys, detail)
            if where not in problems:
                problems[where] = message
            elif detail["type"] == "literal_error":  # the other member of a union
                problems[where] += f", or {message}"
            _remove(tree, keys)
        config = Config.model_validate(tree)  # the rest, for what its keys say together
    listed = [*(f"{where}: {message}" for where, message in problems.items()), *_conflicts(config)]
    if listed:
        raise InvalidConfig(path or "the environment", listed)
    return config


def _sections(section: type[Section]) -> dict[str, type[Section]]:
    """The sections in a section, by their keys."""
    kinds = {key: field.default_factory or type(field.default) for key, field in section.model_fields.items()}
    return {key: kind for key, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}


def _override(tree: dict[Any, Any], section: type[Section], prefix: str, environment: Mapping[str, str]) -> None:
    """Puts what the environment says about the keys of a section into its mapping."""
    below = _sections(section)
    for key in section.model_fields:
        name = f"{prefix}_{key.upper()}"
        if key in below:
            mapping = tree.get(key) or {}
            if isinstance(mapping, dict):  # anything else is a problem of the file
                _override(mapping, below[key], name, environment)
                tree[key] = mapping
        elif key != "tasks" and name in environment:
            tree[key] = None if environment[name] == "null" else environment[name]


def _keys(tree: Any, location: tuple[int | str, ...]) -> list[int | str]:
    """The keys on the way to a location: what pydantic adds to it (an index, a union's member) stands in no mapping."""
    keys: list[int | str] = []
    for part in location:
        if not isinstance(tree, dict) or part not in tree:
            break
        keys.append(part)
        tree = tree[part]
    return keys


def _message(keys: list[int | str], detail: ErrorDetails) -> str:
    value = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            section: type[Section] = Config
            for key in keys[:-1]:
                section = _sections(section).get(str(key), TaskSettings)
            return f"unknown key; known here: {', '.join(section.model_fields)}"
        case "model_type" | "dict_type":
            return f"must be a mapping, not {value!r}"
        case "value_error":
            return str(detail["ctx"]["error"])
    return f"{detail['msg'].replace('Input should', 'should')}, not {value!r}"


def _remove(tree: Any, keys: list[int | str]) -> None:
    *way, last = keys
    for key in way:
        tree = tree.get(key, {})  # one above may have gone already
    tree.pop(last, None)


def _conflicts(config: Config) -> Iterator[str]:
    """What is wrong with keys that are each right."""
    for name, socket in (("serve.socket", config.api_socket), ("serve.admin_socket", config.admin_socket)):
        if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
            yield f"{name}: {socket} is longer than the {_MAX_SOCKET_PATH} bytes a socket path may have"
    if config.api_socket == config.admin_socket:
        yield "serve.admin_socket: must differ from serve.socket"
    tls = config.serve.tls
    if (tls.certificate is None) != (tls.key is None):
        yield "serve.tls: certificate and key go together"
    fleet = config.fleet
    if fleet.noise and fleet.clip is None:
        yield "fleet.noise: noise says something only of what is clipped; set fleet.clip"
    if fleet.noise and set(fleet.send) - {"ledger"}:
        yield "fleet.send: with fleet.noise nothing but ledger: no noise covers adapter and figures"
    if fleet.max_epsilon is not None and not fleet.noise:
        yield "fleet.max_epsilon: without fleet.noise there is no ε that could stay below it"
    if config.engine == "int8" and config.model.path == "default":
        yield "model.path: engine int8 needs the file of a classifier (docs/int8.md)"
    known = methods.OF_ENGINE[config.engine]
    if config.adapt.method not in ("auto", *known):
        yield f"adapt.method: engine {config.engine} has no {config.adapt.method!r}; it has auto, {', '.join(known)}"
    if config.adapt.objective == "metric":
        if config.engine == "int8":
            yield "adapt.objective: engine int8 learns by likelihood alone"
        elif config.adapt.method not in ("auto", *methods.FORWARD_ONLY):
            yield f"adapt.objective: metric has no derivative, by which {config.adapt.method} (adapt.method) learns"


def reference(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every key as (name, default, what it means), for `agentd config --reference` and docs/."""
    below = _sections(section)
    for key, field in section.model_fields.items():
        if key in below:
            yield from reference(below[key], f"{prefix}{key}.")
        else:
            yield prefix + key, field.get_default(call_default_factory=True), field.description or ""
