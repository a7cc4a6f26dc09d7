"""Networks as data: a list of layers, from Python or from a mapping (YAML, JSON).

    name: lenet5
    input: [1, 28, 28]
    layers:
      - conv: {out: 6, kernel: 5, padding: 2}
      - relu
      - max_pool: 2
      - flatten
      - linear: 10

Images are (channels, height, width), point sets (points, coordinates). A `linear` layer acts on the last dimension, so
on a point set it is shared by the points. Convolutions and linear layers have a bias unless `bias: false`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from agentd.int8.invalid import InvalidArchitecture
from agentd.int8.window import MAX_TERMS, Window

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Conv:
    """k x k convolution: (C, H, W) to (out, H', W')."""

    out: int
    kernel: int
    stride: int = 1
    padding: int = 0
    bias: bool = True

    @property
    def window(self) -> Window:
        return Window(self.kernel, self.stride, self.padding)


@dataclass(frozen=True)
class Linear:
    """Fully connected, on the last dimension: (..., K) to (..., out)."""

    out: int
    bias: bool = True


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation per channel. In int8 it is the affine map that it is at inference, and learns as that."""


@dataclass(frozen=True)
class ReLU:
    """max(x, 0)."""


@dataclass(frozen=True)
class MaxPool:
    """Maximum of size x size squares; rows and columns left over are dropped."""

    size: int


@dataclass(frozen=True)
class GlobalMaxPool:
    """Maximum over the points of a set or the pixels of an image: to (channels,)."""


@dataclass(frozen=True)
class Flatten:
    """To one dimension, in the order of (channels, height, width)."""


Layer = Conv | Linear | BatchNorm | ReLU | MaxPool | GlobalMaxPool | Flatten
_KINDS: dict[str, type[Layer]] = {
    "conv": Conv,
    "linear": Linear,
    "batch_norm": BatchNorm,
    "relu": ReLU,
    "max_pool": MaxPool,
    "global_max_pool": GlobalMaxPool,
    "flatten": Flatten,
}
_PREFIX: dict[type[Layer], str] = {Conv: "conv", Linear: "fc", BatchNorm: "bn"}


@dataclass(frozen=True)
class Parameter:
    """One weight or bias. `index` numbers it in its network: the key of its random directions."""

    name: str
    shape: Shape
    layer: int
    index: int


@dataclass(frozen=True)
class Architecture:
    """A network for examples of shape `input`. Checked when made; raises InvalidArchitecture."""

    name: str
    input: Shape
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidArchitecture(self.name, "it has no layers")
        if not 1 <= len(self.input) <= 3 or any(side < 1 for side in self.input):
            raise InvalidArchitecture(self.name, f"an input of shape {list(self.input)} is not possible")
        last = self.shapes()[-1]
        if len(last) != 1 or last[0] < 2:
            raise InvalidArchitecture(self.name, f"it ends with shape {list(last)}, not with one score for each class")
        if not self.parameters():
            raise InvalidArchitecture(self.name, "it has nothing to learn")

    @classmethod
    def parse(cls, data: Mapping[str, object]) -> "Architecture":
        """The architecture in a mapping {name, input, layers}. Raises InvalidArchitecture."""
        name = str(data.get("name", "unnamed"))
        if unknown := sorted(set(data) - {"name", "input", "layers"}):
            raise InvalidArchitecture(name, f"unknown key {unknown[0]!r}; known are name, input and layers")
        shape, layers = data.get("input"), data.get("layers")
        if not isinstance(shape, Sequence) or not all(type(side) is int for side in shape):
            raise InvalidArchitecture(name, "input must be a list of whole numbers, such as [1, 28, 28]")
        if not isinstance(layers, Sequence) or isinstance(layers, str):
            raise InvalidArchitecture(name, "layers must be a list")
        return cls(name, tuple(shape), tuple(_layer(name, i, item) for i, item in enumerate(layers)))

    def as_dict(self) -> dict[str, object]:
        """The mapping that `parse` reads."""
        names = {kind: name for name, kind in _KINDS.items()}
        layers: list[object] = []
        for layer in self.layers:
            options = {f.name: getattr(layer, f.name) for f in fields(layer)}
            layers.append({names[type(layer)]: options} if options else names[type(layer)])
        return {"name": self.name, "input": list(self.input), "layers": layers}

    @property
    def classes(self) -> int:
        return self.shapes()[-1][0]

    def shapes(self) -> list[Shape]:
        """The input's shape and each layer's output shape, without the batch: one more than there are layers."""
        shapes = [self.input]
        for i, layer in enumerate(self.layers):
            shapes.append(self._output(i, layer, shapes[-1]))
        return shapes

    def parameters(self) -> list[Parameter]:
        """All weights and biases in order, named conv1.weight, conv1.bias, ..., fc1.weight, ..., bn1.weight, ..."""
        shapes, counts = self.shapes(), dict.fromkeys(_PREFIX.values(), 0)
        parameters: list[Parameter] = []
        for i, layer in enumerate(self.layers):
            if (prefix := _PREFIX.get(type(layer))) is None:
                continue
            counts[prefix] += 1
            weight, bias = _parameter_shapes(layer, shapes[i])
            for kind, shape in (("weight", weight), ("bias", bias)):
                if shape is not None:
                    parameters.append(Parameter(f"{prefix}{counts[prefix]}.{kind}", shape, i, len(parameters)))
        return parameters

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters())

    def trained_layers(self) -> list[int]:
        """The indices of the layers that have parameters."""
        return sorted({parameter.layer for parameter in self.parameters()})

    def cutoff(self, bp_layers: int) -> int:
        """The first layer that learns by BP when the last `bp_layers` layers with parameters do.

        0 is full ZO (the cutoff is then the number of layers), all of them full BP. Raises ValueError outside that.
        """
        layers = self.trained_layers()
        if not 0 <= bp_layers <= len(layers):
            raise ValueError(f"{self.name} has {len(layers)} layers to train, so bp_layers cannot be {bp_layers}")
        return len(self.layers) if bp_layers == 0 else layers[len(layers) - bp_layers]

    def _output(self, i: int, layer: Layer, shape: Shape) -> Shape:
        def check(holds: bool, reason: str) -> None:
            if not holds:
                raise InvalidArchitecture(self.name, f"{reason} (its input is {list(shape)})", i)

        if isinstance(layer, (Conv, MaxPool)):
            check(len(shape) == 3, "it needs an image of shape (channels, height, width)")
        if isinstance(layer, Conv):
            check(min(layer.out, layer.kernel, layer.stride) >= 1, "out, kernel and stride must be at least 1")
            check(0 <= layer.padding < layer.kernel, "padding must be at least 0 and less than the kernel")
            check(max(shape[0], layer.out) * layer.kernel**2 <= MAX_TERMS, f"a sum may have {MAX_TERMS} terms")
            height, width = layer.window.output(*shape[1:])
            check(min(height, width) >= 1, "the kernel is larger than the padded image")
            return layer.out, height, width
        if isinstance(layer, Linear):
            check(layer.out >= 1, "out must be at least 1")
            check(len(shape) != 3, "flatten the image first")
            check(max(shape[-1], layer.out) <= MAX_TERMS, f"a sum may have {MAX_TERMS} terms")
            return (*shape[:-1], layer.out)
        if isinstance(layer, MaxPool):
            check(1 <= layer.size <= min(shape[1:]), "the square is empty or larger than the image")
            return shape[0], shape[1] // layer.size, shape[2] // layer.size
        if isinstance(layer, GlobalMaxPool):
            check(len(shape) > 1, "there is nothing to pool over")
            return (shape[0],) if len(shape) == 3 else (shape[-1],)
        if isinstance(layer, Flatten):
            return (math.prod(shape),)
        return shape


def _parameter_shapes(layer: Layer, shape: Shape) -> tuple[Shape, Shape | None]:
    if isinstance(layer, Conv):
        return (layer.out, shape[0], layer.kernel, layer.kernel), (layer.out,) if layer.bias else None
    if isinstance(layer, Linear):
        return (layer.out, shape[-1]), (layer.out,) if layer.bias else None
    channels = shape[0] if len(shape) == 3 else shape[-1]
    return (channels,), (channels,)


def _layer(name: str, i: int, item: object) -> Layer:
    if isinstance(item, str):
        kind, options = item, None
    elif isinstance(item, Mapping) and len(item) == 1:
        ((kind, options),) = item.items()
    else:
        raise InvalidArchitecture(name, f"{item!r} is neither a name nor a mapping of one name to its options", i)
    if kind not in _KINDS:
        raise InvalidArchitecture(name, f"unknown kind {kind!r}; known are {', '.join(_KINDS)}", i)
    known = {f.name: f.type for f in fields(_KINDS[kind])}
    if options is None:
        options = {}
    elif not isinstance(options, Mapping):
        options = dict.fromkeys([next(iter(known), "")], options)
    for key, value in options.items():
        if key not in known:
            raise InvalidArchitecture(name, f"{kind} has no option {key!r}", i)
        if type(value) is not known[key]:
            raise InvalidArchitecture(name, f"{kind}.{key} must be {known[key].__name__}, not {value!r}", i)  # type: ignore[union-attr]  # field types are classes in this module
    try:
        return _KINDS[kind](**options)
    except TypeError as error:
        raise InvalidArchitecture(name, f"{kind}: {str(error).partition('() ')[2]}", i) from None


LENET5 = Architecture(
    "lenet5",
    (1, 28, 28),
    (
        *(Conv(6, 5, padding=2), ReLU(), MaxPool(2)),
        *(Conv(16, 5, padding=2), ReLU(), MaxPool(2)),
        Flatten(),
        *(Linear(120), ReLU(), Linear(84), ReLU(), Linear(10)),
    ),
)
"""107,786 parameters."""

POINTNET = Architecture(
    "pointnet",
    (1024, 3),
    (
        *(layer for width in (64, 64, 64, 128, 1024) for layer in (Linear(width, bias=False), BatchNorm(), ReLU())),
        GlobalMaxPool(),
        *(Linear(512), ReLU(), Linear(256), ReLU(), Linear(40)),
    ),
)
"""816,744 parameters; its input and feature transforms are left out."""

BUILT_IN = {architecture.name: architecture for architecture in (LENET5, POINTNET)}
