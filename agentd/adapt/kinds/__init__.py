"""What differs from one kind of engine to the next, for everything that adapts a model."""

from typing import Any

from agentd.adapt.kinds.int8 import Int8
from agentd.adapt.kinds.kind import EngineKind
from agentd.adapt.kinds.llamacpp import LlamaCpp
from agentd.adapt.kinds.transformers import Transformers
from agentd.config.schema import Config
from agentd.models import ModelFile

_KINDS: dict[str, type[EngineKind[Any]]] = {kind.name: kind for kind in (LlamaCpp, Transformers, Int8)}


def choose(config: Config, model: ModelFile) -> EngineKind[Any]:
    """The configured kind, for this model. Nothing else asks which engine is configured."""
    return _KINDS[config.engine](model)
