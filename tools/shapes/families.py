"""The families there are, each tiny and at its real sizes: those of the published configurations.

What a family needs is what the pinned llama.cpp asks of it. A tiny model keeps head layouts, norms, windows, biases,
rope settings and whether the head is tied.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tools.shapes import dense, mixed
from tools.shapes.model import TINY, Model, Size


@dataclass(frozen=True)
class Family:
    architecture: str
    sizes: dict[str, Size]
    build: Callable[[Model], None]


def _tiny(blocks: int = 4, head_dim: int = 32, *, tied: bool = True, n_kv: int = 2, **more: int) -> dict[str, Size]:
    return {TINY: Size(64, 96, 4, n_kv, head_dim, blocks, tied=tied, more=more)}


_GRANITE4 = {"state": 128, "ssm_heads": 48, "period": 10, "offset": 5}

FAMILIES: dict[str, Family] = {
    "llama3.2": Family(
        "llama",
        {
            **_tiny(),
            "1B": Size(2048, 8192, 32, 8, 64, 16, 128256),
            "3B": Size(3072, 8192, 24, 8, 128, 28, 128256),
        },
        dense.llama3,
    ),
    "mistral": Family(
        "llama", {**_tiny(tied=False), "7B": Size(4096, 14336, 32, 8, 128, 32, 32768, False)}, dense.plain
    ),
    "smollm2": Family(
        "llama",
        {
            **_tiny(head_dim=16, n_kv=4),
            "135M": Size(576, 1536, 9, 3, 64, 30, 49152),
            "360M": Size(960, 2560, 15, 5, 64, 32, 49152),
            "1.7B": Size(2048, 8192, 32, 32, 64, 24, 49152),
        },
        dense.plain,
    ),
    "smollm3": Family("smollm3", {**_tiny(6), "3B": Size(2048, 11008, 16, 4, 128, 36, 128256)}, dense.plain),
    "ministral3": Family("mistral3", {**_tiny(), "3B": Size(3072, 9216, 32, 8, 128, 26, 131072)}, dense.mistral3),
    "qwen2.5": Family(
        "qwen2",
        {
            **_tiny(head_dim=16),
            "0.5B": Size(896, 4864, 14, 2, 64, 24, 151936),
            "1.5B": Size(1536, 8960, 12, 2, 128, 28, 151936),
        },
        dense.with_bias,
    ),
    "qwen3": Family(
        "qwen3",
        {
            **_tiny(),
            "0.6B": Size(1024, 3072, 16, 8, 128, 28, 151936),
            "1.7B": Size(2048, 6144, 16, 8, 128, 28, 151936),
            "4B": Size(2560, 9728, 32, 8, 128, 36, 151936),
            "8B": Size(4096, 12288, 32, 8, 128, 36, 151936, False),
        },
        dense.with_qk_norm,
    ),
    "qwen3-moe": Family("qwen3moe", _tiny(experts=8, used=2, width=32), mixed.qwen3_moe),
    "qwen3.5": Family(
        "qwen35",
        {
            **_tiny(8, state=32, k_heads=2, v_heads=2),
            "0.8B": Size(1024, 3584, 8, 2, 256, 24, 248320, more={"state": 128, "k_heads": 16, "v_heads": 16}),
        },
        mixed.qwen35,
    ),
    "qwen3.5-4b": Family(  # more heads of values than of keys, which are stored in another order
        "qwen35",
        {
            **_tiny(4, state=32, k_heads=2, v_heads=4),
            "4B": Size(2560, 9216, 16, 4, 256, 32, 248320, more={"state": 128, "k_heads": 16, "v_heads": 32}),
        },
        mixed.qwen35,
    ),
    "gemma2": Family("gemma2", {**_tiny(), "2B": Size(2304, 9216, 8, 4, 256, 26, 256000)}, dense.gemma2),
    "gemma3": Family("gemma3", {**_tiny(7, n_kv=1), "1B": Size(1152, 6912, 4, 1, 256, 26, 262144)}, dense.gemma3),
    "functiongemma": Family(
        "gemma3", {**_tiny(6, n_kv=1), "270M": Size(640, 2048, 4, 1, 256, 18, 262144)}, dense.gemma3
    ),
    "gemma3n": Family("gemma3n", _tiny(5), mixed.gemma3n),
    "gemma4": Family("gemma4", _tiny(6, n_kv=2, per_block=0), mixed.gemma4),
    "gemma4-e2b": Family("gemma4", _tiny(6, n_kv=1, per_block=32), mixed.gemma4),
    "lfm2": Family(
        "lfm2",
        {
            **_tiny(5, 16),
            "350M": Size(1024, 4608, 16, 8, 64, 16, 65536),
            "1.2B": Size(2048, 8192, 32, 8, 64, 16, 65536),
        },
        mixed.lfm2,
    ),
    "lfm2-moe": Family("lfm2moe", _tiny(4, 16, experts=8, used=2, width=32), mixed.lfm2_moe),
    "granite3": Family("granite", {**_tiny(), "2B": Size(2048, 8192, 32, 8, 64, 40, 49155)}, dense.granite),
    "granite3-moe": Family("granitemoe", _tiny(experts=8, used=2), mixed.granite_moe),
    "granite4": Family(
        "granitehybrid",
        {
            **_tiny(4, 16, state=16, ssm_heads=4, period=4, offset=2),
            "350M": Size(768, 2048, 12, 4, 64, 32, 100352, more=_GRANITE4),
            "1B": Size(1536, 4096, 12, 4, 128, 40, 100352, more=_GRANITE4),
        },
        mixed.granite_hybrid,
    ),
    "phi4-mini": Family("phi3", {**_tiny(head_dim=16), "3.8B": Size(3072, 8192, 24, 8, 128, 32, 200064)}, dense.phi3),
    "exaone4": Family(
        "exaone4",
        {**_tiny(head_dim=16), "1.2B": Size(2048, 4096, 32, 8, 64, 30, 102400)},
        dense.exaone4,
    ),
    "olmo2": Family(
        "olmo2",
        {**_tiny(head_dim=16, tied=False), "1B": Size(2048, 8192, 16, 16, 128, 16, 100352, False)},
        dense.olmo2,
    ),
    "starcoder2": Family(
        "starcoder2", {**_tiny(head_dim=16), "3B": Size(3072, 12288, 24, 2, 128, 30, 49152)}, dense.starcoder2
    ),
    "glm4": Family("glm4", _tiny(tied=False), dense.glm4),
    "cohere2": Family("cohere2", _tiny(head_dim=16), dense.cohere2),
    "ernie4.5": Family("ernie4_5", _tiny(), dense.plain),
    "arcee": Family("arcee", _tiny(tied=False), dense.arcee),
    "seed-oss": Family("seed_oss", _tiny(tied=False), dense.seed_oss),
    "hunyuan": Family("hunyuan-dense", _tiny(), dense.with_qk_norm),
}
