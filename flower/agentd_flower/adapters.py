"""The strategy *adapter*: low-rank factors of several boards as one, with the mean of their products.

A board's change of a layer is B A. The mean of the A times the mean of the B is not the mean of the B A: with boards
that differ it is full of products of one board's B with another's A. So products are averaged. A mean needs none of
them formed: factors stand side by side, [w1 B1, w2 B2, ...] [A1; A2; ...] is the weighted sum (FLoRA, Wang et al.
2024), whatever ranks boards have. A trimmed mean goes coordinate by coordinate over the products themselves, a layer at
a time. Either is then brought back to `rank` by a truncated singular value decomposition (FlexLoRA, Bai et al. 2024),
which is the nearest there is; how much of the squared norm that keeps is told. Values are split evenly: A = sqrt(S) V',
B = U sqrt(S).
"""

import io
import json
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from agentd_flower.aggregate import combine, scales, shares
from agentd_flower.wire import Unusable

Floats = NDArray[np.float64]
Pair = tuple[Floats, Floats]
"""A (rank, in) and B (out, rank); the layer's weight becomes W + B A."""

MAX_RANK = 4096
_PREFIX = "base_model.model."  # PEFT's names
_OVERSAMPLED, _ROUNDS = 8, 2  # of the randomised decomposition
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class Factors:
    """A pair for every layer that is changed. `architecture` is the GGUF adapter's."""

    pairs: Mapping[str, Pair]
    architecture: str = ""

    @property
    def rank(self) -> int:
        return max((len(a) for a, _ in self.pairs.values()), default=0)

    def minus(self, other: "Factors") -> "Factors":
        """The difference of the changes, as factors side by side."""
        return side_by_side([self, other], [1.0, -1.0])

    def norm(self) -> float:
        """The Frobenius norm of all changes together, from the factors' Gram matrices."""
        squares = sum(float(np.sum((b.T @ b) * (a @ a.T))) for a, b in self.pairs.values())
        return max(0.0, squares) ** 0.5

    def scaled(self, factor: float) -> "Factors":
        return Factors({name: (a, factor * b) for name, (a, b) in self.pairs.items()}, self.architecture)


def side_by_side(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The weighted sum of changes; a layer that one does not have is not changed by it."""
    pairs: dict[str, Pair] = {}
    for name in sorted({name for each in factors for name in each.pairs}):
        mine = [(each.pairs[name], weight) for each, weight in zip(factors, weights, strict=True) if name in each.pairs]
        shapes = {(a.shape[1], b.shape[0]) for (a, b), _ in mine}
        if len(shapes) > 1:
            raise Unusable(f"boards' factors of {name} are of different shapes")
        pairs[name] = (
            np.concatenate([a for (a, _), _ in mine]),
            np.concatenate([weight * b for (_, b), weight in mine], axis=1),
        )
    return Factors(pairs, next((each.architecture for each in factors if each.architecture), ""))


def averaged(
    start: Factors,
    changes: Sequence[Factors],
    examples: Sequence[int | None],
    *,
    robust: str,
    trim: float,
    rank: int,
    share: float = 1.0,
) -> tuple[Factors, float]:
    """`start` moved by what boards changed it by, at most of this rank, and the share of the squared norm that is kept
    of it. `share` is that of these boards among all."""
    bounds = scales([each.norm() for each in changes])
    changes = [each.scaled(scale) for each, scale in zip(changes, bounds, strict=True)]
    if robust == "mean" or len(changes) < 3:
        counted = shares(examples if robust == "mean" else [None] * len(changes))
        return truncated(side_by_side([start, *changes], [1.0, *(share * each for each in counted)]), rank)
    pairs: dict[str, Pair] = {}
    kept = total = 0.0
    shapes = {name: (b.shape[0], a.shape[1]) for each in changes for name, (a, b) in each.pairs.items()}
    shapes |= {name: (b.shape[0], a.shape[1]) for name, (a, b) in start.pairs.items()}
    for name, shape in sorted(shapes.items()):
        products = [
            each.pairs[name][1] @ each.pairs[name][0] if name in each.pairs else np.zeros(shape) for each in changes
        ]
        if any(product.shape != shape for product in products):
            raise Unusable(f"boards' factors of {name} are of different shapes")
        whole = share * combine(np.stack(products), examples, robust, trim)
        if name in start.pairs:
            a, b = start.pairs[name]
            whole = whole + b @ a
        pairs[name], values = _decomposed(whole, rank)
        kept += float(np.sum(values**2))
        total += float(np.sum(whole**2))
    architecture = next((each.architecture for each in [start, *changes] if each.architecture), "")
    return Factors(pairs, architecture), kept / total if total else 1.0


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest factors of at most this rank, and the share of the squared norm that they keep. Needs no product."""
    pairs: dict[str, Pair] = {}
    kept = total = 0.0
    for name, (a, b) in factors.pairs.items():
        q_b, r_b = np.linalg.qr(b)
        q_a, r_a = np.linalg.qr(a.T)
        u, values, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
        n = min(rank, len(values))
        root = np.sqrt(values[:n])
        pairs[name] = (root[:, None] * (v[:n] @ q_a.T), (q_b @ u[:, :n]) * root)
        kept += float(np.sum(values[:n] ** 2))
        total += float(np.sum(values**2))
    return Factors(pairs, factors.architecture), kept / total if total else 1.0


def _decomposed(whole: Floats, rank: int) -> tuple[Pair, Floats]:
    """Factors of a matrix by a randomised decomposition (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1)."""
    rank = min(rank, *whole.shape)
    dice = np.random.default_rng(0)
    basis = whole @ dice.standard_normal((whole.shape[1], min(rank + _OVERSAMPLED, *whole.shape)))
    for _ in range(_ROUNDS):
        basis = whole @ np.linalg.qr(whole.T @ np.linalg.qr(basis)[0])[0]
    q = np.linalg.qr(basis)[0]
    u, values, v = np.linalg.svd(q.T @ whole, full_matrices=False)
    root = np.sqrt(values[:rank])
    return (root[:, None] * v[:rank], (q @ u[:, :rank]) * root), values[:rank]


# --- files


def read_safetensors(data: bytes) -> Factors:
    """Low-rank factors by PEFT's names, its scale being 1. Raises Unusable."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        table = json.loads(data[8 : 8 + length])
        table.pop("__metadata__", None)
        tensors = {}
        for name, described in table.items():
            begin, end = described["data_offsets"]
            if not 0 <= begin <= end <= len(data) - 8 - length:
                raise ValueError("cut short")
            part = data[8 + length + begin : 8 + length + end]
            if described["dtype"] == "BF16":
                values = (np.frombuffer(part, "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(part, np.dtype(_DTYPES[described["dtype"]]).newbyteorder("<"))
            tensors[name] = values.reshape(described["shape"]).astype(np.float64)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise Unusable(f"its low-rank factors cannot be read: {error}") from None
    named = {}
    for name, a in tensors.items():
        layer, found, _ = name.removeprefix(_PREFIX).partition(".lora_A.weight")
        if found:
            named[layer] = a, tensors.get(f"{_PREFIX}{layer}.lora_B.weight")
    return Factors(_checked(named, len(tensors)))


def write_safetensors(factors: Factors) -> bytes:
    """The same names, float32; every layer with the same rank, as agentd has it."""
    rank = factors.rank
    tensors: dict[str, NDArray[np.float32]] = {}
    for layer, (a, b) in sorted(factors.pairs.items()):
        more = rank - len(a)
        a, b = np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = a.astype("<f4")
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = b.astype("<f4")
    tree, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        tree[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 8)
    out = io.BytesIO()
    out.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        out.write(np.ascontiguousarray(tensor).tobytes())
    return out.getvalue()


def read_gguf(data: bytes) -> Factors:
    """An adapter of llama.cpp, its scale alpha / rank put into B. Raises Unusable."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.gguf"
        path.write_bytes(data)
        try:
            reader = gguf.GGUFReader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
            tensors = {
                each.name: np.array(gguf.quants.dequantize(each.data, each.tensor_type)) for each in reader.tensors
            }
            alpha, architecture = float(fields["adapter.lora.alpha"]), str(fields["general.architecture"])
        except Exception as error:  # a reader of files that are meant well
            raise Unusable(f"its adapter cannot be read: {error}") from None
    named = {}
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            layer = name.removesuffix(".lora_a")
            b = tensors.get(f"{layer}.lora_b")
            named[layer] = (
                a.astype(np.float64),
                None if b is None else b.astype(np.float64) * (alpha / max(1, len(a))),
            )
    return Factors(_checked(named, len(tensors)), architecture)


def write_gguf(factors: Factors) -> bytes:
    """An adapter of llama.cpp whose scale is 1: alpha is the rank, which all layers have alike."""
    rank = factors.rank
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.gguf"
        writer = gguf.GGUFWriter(path, factors.architecture)
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(rank))
        for layer, (a, b) in sorted(factors.pairs.items()):
            more = rank - len(a)
            writer.add_tensor(f"{layer}.lora_a", np.ascontiguousarray(np.pad(a, ((0, more), (0, 0))), np.float32))
            writer.add_tensor(f"{layer}.lora_b", np.ascontiguousarray(np.pad(b, ((0, 0), (0, more))), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _checked(named: Mapping[str, tuple[Floats, Floats | None]], tensors: int) -> dict[str, Pair]:
    """Raises Unusable."""
    pairs: dict[str, Pair] = {}
    for layer, (a, b) in named.items():
        if b is None or a.ndim != 2 or b.ndim != 2 or not 0 < len(a) == b.shape[1] <= MAX_RANK:
            raise Unusable(f"its factors of {layer:.80} do not fit one another")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise Unusable(f"its factors of {layer:.80} are not finite")
        pairs[layer] = a, b
    if not pairs or 2 * len(pairs) != tensors:
        raise Unusable("it does not hold low-rank factors in pairs")
    return pairs
