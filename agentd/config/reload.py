"""What of a changed configuration counts at once, and what needs a restart."""

from dataclasses import dataclass
from typing import Any

from agentd.config.schema import Config, Section

# Everything else is read when it is needed, so that a new value counts from the next request or pass on.
FIXED = frozenset(
    {
        *("engine", "state.dir", "model.path", "model.context", "model.threads", "model.gpu_layers", "model.dtype"),
        *("serve.socket", "serve.admin_socket", "serve.tcp", "serve.require_key", "serve.slots"),
        "serve.telemetry.endpoint",
        *("serve.tls.certificate", "serve.tls.key"),  # what the files hold is read again
    }
)


@dataclass(frozen=True)
class Reload:
    """`config` is what is in effect from now on; `changed` and `fixed` name the keys that differ."""

    config: Config
    changed: list[str]
    fixed: list[str]

    @property
    def summary(self) -> str:
        parts = [f"changed: {', '.join(self.changed) or 'nothing'}"]
        if self.fixed:
            parts.append(f"only after a restart: {', '.join(self.fixed)}")
        return "; ".join(parts)


def compare(running: Config, read: Config) -> Reload:
    changed: list[str] = []
    fixed: list[str] = []
    config: Config = _merged(running, read, "", changed, fixed)
    return Reload(config, changed, fixed)


def _merged(running: Any, read: Any, prefix: str, changed: list[str], fixed: list[str]) -> Any:
    values: dict[str, Any] = {}
    for key in type(running).model_fields:
        name, old, new = f"{prefix}{key}", getattr(running, key), getattr(read, key)
        if isinstance(old, Section):
            values[key] = _merged(old, new, f"{name}.", changed, fixed)
        elif old == new:
            continue
        elif name in FIXED:
            fixed.append(name)
        else:
            changed.append(name)
            values[key] = new
    return running.model_copy(update=values)
