"""A grammar of networks: what people write in ``forward``, one small module per idiom, stacked at random.

:func:`networks` is a hypothesis strategy of :class:`Network`, a frozen description whose ``repr`` rebuilds it;
:func:`build` makes the module and its example inputs of one. A network is a stem, three to seven blocks and a classifier. Its
blocks take and return one of two streams, and :func:`shape_after` follows the shape through them:

- ``image``: ``[B, C, S, S]``, channels ``C`` and side ``S``;
- ``tokens``: ``[B, N, C]``, features ``C`` (``channels`` here) and length ``N`` (``size`` here).

Sizes that users bake into Python (``view(b, n, self.heads, 4)``, ``x[:, :3]``, ``c // self.num_heads``) are baked here: the classes
below are written like users write them, on purpose without a common interpreter. A class is a kind of block as soon as
:func:`kind` decorates it; each option is a keyword of its constructor and lists its choices, simple ones first, because hypothesis
shrinks to the front. :data:`LOSES` says which kinds hold units of their own.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

BATCH = 2
MOST = 24  # channels at most
CLASSES = 3
WIDTHS = (4, 5, 6, 8, 10, 12, 16, 24)
ENTRIES = {"image": 3, "tokens": 5}  # channels of the input of each stream
CONDITIONS = 7  # features of the second input that scales the channels


# --- Descriptions ---


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape between two blocks: ``image`` ``[B, channels, size, size]`` or ``tokens`` ``[B, size, channels]``."""

    stream: str
    channels: int
    size: int

    def sizes(self) -> tuple[int, ...]:
        """Return the sizes of a tensor of this shape."""
        if self.stream == "tokens":
            return (BATCH, self.size, self.channels)
        return (BATCH, self.channels, self.size, self.size)


@dataclasses.dataclass(frozen=True, repr=False)
class Block:
    """One block: the name of its class and the keywords of the constructor, of which ``body`` and the like hold blocks."""

    kind: str
    options: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"block({', '.join([repr(self.kind), *(f'{name}={value!r}' for name, value in self.options)])})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis reports failures with its own printer, which asks for this


def block(kind: str, **options: Any) -> Block:
    """Return the description of a block, as ``repr`` writes it."""
    return Block(kind, tuple(options.items()))


@dataclasses.dataclass(frozen=True)
class Network:
    """Description of a network.

    Attributes:
        stream: Of the input: ``"image"`` or ``"tokens"``.
        size: Side of the image or number of tokens.
        width: Channels after the stem.
        blocks: From the stem to the head.
        head: How the stream becomes a row per sample: a name in ``HEADS`` of its stream.
        hidden: Features of a hidden layer before the classifier; 0 for none.
        second: What a second input does: ``"none"``, ``"add"``, ``"concat"`` or ``"scale"``.
        outputs: ``"tensor"``, ``"tuple"`` (with the row), ``"dict"`` (with an auxiliary classifier) or ``"auxiliary"``, where that
            classifier answers only in train mode.
        seed: Of the weights and inputs.
    """

    stream: str
    size: int
    width: int
    blocks: tuple[Block, ...]
    head: str = "mean"
    hidden: int = 0
    second: str = "none"
    outputs: str = "tensor"
    seed: int = 0

    def stem_shape(self) -> Shape:
        """Return the shape that the first block takes."""
        return Shape(self.stream, self.width * (2 if self.second == "concat" else 1), self.size)


# --- Kinds ---

Choices = Sequence[Any] | Callable[[Shape], Sequence[Any]]
BODY = ("body",)  # the only choice of an option that holds blocks


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of blocks.

    Attributes:
        module: Its class; takes the input's :class:`Shape` and the options.
        stream: ``image``, ``tokens`` or ``any``.
        when: Shapes that it takes, beyond those for which every option has a choice.
        after: The shape that it returns; by default the option ``width`` are the channels.
        moves: Whether it changes the stream or its size, which the body of a composite may not.
        options: Choices of each option, or a function of the input's shape that lists them.
    """

    module: Callable[..., nn.Module]
    stream: str
    when: Callable[[Shape], bool]
    after: Callable[..., Shape]
    moves: bool
    options: dict[str, Choices]

    def choices(self, shape: Shape) -> dict[str, Sequence[Any]]:
        """Return the choices of each option on an input of ``shape``."""
        return {name: options(shape) if callable(options) else options for name, options in self.options.items()}

    def fits(self, shape: Shape) -> bool:
        """Whether it takes an input of ``shape``."""
        return self.stream in ("any", shape.stream) and self.when(shape) and all(self.choices(shape).values())

    @property
    def conditional(self) -> bool:
        """Whether it takes only some shapes of its stream."""
        return self.when is not always or any(callable(options) for options in self.options.values())

    @property
    def composite(self) -> bool:
        """Whether it holds blocks."""
        return BODY in self.options.values()


KINDS: dict[str, Kind] = {}


def always(shape: Shape) -> bool:
    """Take every shape."""
    return True


def same(shape: Shape, **options: Any) -> Shape:
    """Return the shape after a block whose channels are its option ``width``, if it has one."""
    return dataclasses.replace(shape, channels=options.get("width", shape.channels))


def kind(
    stream: str,
    when: Callable[[Shape], bool] = always,
    after: Callable[..., Shape] = same,
    moves: bool = False,
    **options: Choices,
) -> Callable[[Any], Any]:
    """Return a decorator that enters a class in :data:`KINDS` under its own name."""

    def enter(module: Any) -> Any:
        KINDS[module.__name__] = Kind(module, stream, when, after, moves, options)
        return module

    return enter


def make(shape: Shape, described: Block) -> nn.Module:
    """Return a fresh module of ``described`` for an input of ``shape``."""
    return KINDS[described.kind].module(shape, **dict(described.options))


def shape_after(described: Block, shape: Shape) -> Shape:
    """Return the shape that ``described`` makes of ``shape``."""
    return KINDS[described.kind].after(shape, **dict(described.options))


def walk(blocks: tuple[Block, ...]) -> Iterator[Block]:
    """Yield the blocks and those inside them."""
    for one in blocks:
        yield one
        for _, value in one.options:
            if isinstance(value, tuple) and value and isinstance(value[0], Block):
                yield from walk(value)


# --- Words that many blocks share ---


class Exp(nn.Module):
    """An activation with f(0) = 1, clamped so that stacks of it stay finite."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x.clamp(max=1.0))


ZERO_AT_ZERO: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "none": nn.Identity,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu_inplace": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "hardswish": nn.Hardswish,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
    "relu6": nn.ReLU6,
}
SHIFTED_AT_ZERO: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "hardsigmoid": nn.Hardsigmoid,
    "exp": Exp,
}
ACTIVATIONS = ZERO_AT_ZERO | SHIFTED_AT_ZERO
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2 if channels % 2 == 0 else 1, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "batch_bare": lambda channels: nn.BatchNorm2d(channels, affine=False),
}
ACTS = tuple(ACTIVATIONS)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """Return a convolution that keeps the side of the image."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def conv_norm_act(inputs: int, outputs: int, kernel: int, norm: str, act: str, **options: Any) -> nn.Sequential:
    """Return a convolution with a norm and an activation; the convolution has a bias where no norm follows."""
    return nn.Sequential(
        conv(inputs, outputs, kernel, bias=norm == "none", **options), NORMS[norm](outputs), ACTIVATIONS[act]()
    )


def divisors(number: int, *among: int) -> list[int]:
    """Return those of ``among`` that divide ``number``."""
    return [one for one in among if number % one == 0]


def up_to(*among: int) -> Callable[[Shape], list[int]]:
    """Return the choices among ``among`` that fit beside the channels that there are."""
    return lambda shape: [one for one in among if shape.channels + one <= MOST]


# --- Images: convolutions ---


@kind("image", width=WIDTHS, kernel=(3, 1), norm=tuple(NORMS), act=ACTS, padding_mode=("zeros", "circular", "reflect"))
class Conv(nn.Module):
    def __init__(self, s: Shape, width: int, kernel: int, norm: str, act: str, padding_mode: str) -> None:
        super().__init__()
        self.conv = conv(s.channels, width, kernel, bias=norm == "none", padding_mode=padding_mode)
        self.norm = NORMS[norm](width)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def halved(shape: Shape, **options: Any) -> Shape:
    return dataclasses.replace(same(shape, **options), size=(shape.size + 1) // 2)


@kind("image", lambda s: s.size >= 4, halved, moves=True, width=WIDTHS, norm=tuple(NORMS), act=ACTS)
class StridedConv(nn.Module):
    def __init__(self, s: Shape, width: int, norm: str, act: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(s.channels, width, 3, stride=2, padding=1)
        self.norm = NORMS[norm](width)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


@kind(
    "image",
    after=lambda s, groups, each, **_: dataclasses.replace(s, channels=groups * each),
    groups=lambda s: divisors(s.channels, 2, 3, 4),
    each=(2, 3, 4),
    act=ACTS,
)
class GroupedConv(nn.Module):
    def __init__(self, s: Shape, groups: int, each: int, act: str) -> None:
        super().__init__()
        self.conv = conv(s.channels, groups * each, groups=groups)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


@kind("image", width=WIDTHS, multiplier=(1, 2), act=ACTS)
class DepthwiseSeparable(nn.Module):
    def __init__(self, s: Shape, width: int, multiplier: int, act: str) -> None:
        super().__init__()
        self.depthwise = conv_norm_act(s.channels, s.channels * multiplier, 3, "batch", act, groups=s.channels)
        self.pointwise = nn.Conv2d(s.channels * multiplier, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


@kind("image", width=WIDTHS, style=("plain", "scaled", "standardized"))
class BareConv(nn.Module):
    """Parameters without a module."""

    def __init__(self, s: Shape, width: int, style: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, s.channels, 3, 3))
        self.bias = nn.Parameter(torch.randn(width))
        self.scale = nn.Parameter(torch.ones(width)) if style == "scaled" else None
        self.standardized = style == "standardized"

    def forward(self, x: Tensor) -> Tensor:
        weight = self.w
        if self.scale is not None:
            weight = weight * self.scale[:, None, None, None]
        if self.standardized:
            weight = weight - weight.mean((1, 2, 3), keepdim=True)
        return F.relu(F.conv2d(x, weight, self.bias, padding=1))


@kind("image", hidden=(4, 6, 8), norms=("shared", "own"))
class ConvTwice(nn.Module):
    """One convolution at two places of the network."""

    def __init__(self, s: Shape, hidden: int, norms: str) -> None:
        super().__init__()
        self.enter = nn.Conv2d(s.channels, hidden, 1)
        self.conv = conv(hidden, hidden, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.norm2 = nn.BatchNorm2d(hidden) if norms == "own" else self.norm1
        self.leave = nn.Conv2d(hidden, s.channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv(self.enter(x))))
        y = F.relu(self.norm2(self.conv(y)))
        return x + self.leave(y)


@kind("image", hidden=(4, 6, 8), dim=(0, 1))
class WeightNormConv(nn.Module):
    def __init__(self, s: Shape, hidden: int, dim: int) -> None:
        super().__init__()
        self.conv1 = parametrizations.weight_norm(conv(s.channels, hidden), dim=dim)
        self.conv2 = parametrizations.weight_norm(nn.Conv2d(hidden, s.channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


@kind("image", width=(4, 6, 8, 12), groups=lambda s: divisors(s.channels, 1, 2), act=ACTS)
class TransposedConv(nn.Module):
    def __init__(self, s: Shape, width: int, groups: int, act: str) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(s.channels, width, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(width)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def doubled(shape: Shape, **options: Any) -> Shape:
    return dataclasses.replace(same(shape, **options), size=2 * shape.size)


@kind("image", lambda s: s.size <= 4, doubled, moves=True, width=WIDTHS)
class UpConv(nn.Module):
    def __init__(self, s: Shape, width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(s.channels, width, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.up(x))


@kind("image", lambda s: s.size <= 4, doubled, moves=True, width=(4, 5, 6))
class PixelShuffle(nn.Module):
    def __init__(self, s: Shape, width: int) -> None:
        super().__init__()
        self.conv = conv(s.channels, 4 * width)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(F.relu(self.conv(x)))


@kind("image", lambda s: s.size % 2 == 0 and s.size > 2, halved, moves=True, width=WIDTHS)
class SpaceToDepth(nn.Module):
    def __init__(self, s: Shape, width: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(4 * s.channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, :, i::2, j::2] for i in range(2) for j in range(2)]
        return self.reduction(torch.cat(corners, 1))


# --- Images: shortcuts and branches ---


@kind("image", hidden=WIDTHS, norm=tuple(NORMS), act=ACTS, last=("none", "relu", "relu_inplace"))
class BasicBlock(nn.Module):
    def __init__(self, s: Shape, hidden: int, norm: str, act: str, last: str) -> None:
        super().__init__()
        self.conv1 = conv_norm_act(s.channels, hidden, 3, norm, act)
        self.conv2 = conv_norm_act(hidden, s.channels, 3, norm, "none")
        self.last = ACTIVATIONS[last]()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        out += x
        return self.last(out)


@kind("image", hidden=(4, 6, 8, 12), groups=(1, 2), norm=tuple(NORMS), act=ACTS)
class Bottleneck(nn.Module):
    def __init__(self, s: Shape, hidden: int, groups: int, norm: str, act: str) -> None:
        super().__init__()
        self.reduce = conv_norm_act(s.channels, hidden, 1, norm, act)
        self.conv = conv_norm_act(hidden, hidden, 3, norm, act, groups=groups)
        self.expand = conv_norm_act(hidden, s.channels, 1, norm, "none")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.expand(self.conv(self.reduce(x))))


@kind("image", hidden=(8, 10, 12, 16), act=ACTS)
class InvertedResidual(nn.Module):
    def __init__(self, s: Shape, hidden: int, act: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_norm_act(s.channels, hidden, 1, "batch", act),
            conv_norm_act(hidden, hidden, 3, "batch", act, groups=hidden),
            conv_norm_act(hidden, s.channels, 1, "batch", "none"),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


@kind(
    "image",
    after=lambda s, growth, **_: dataclasses.replace(s, channels=s.channels + growth),
    growth=up_to(2, 3, 4, 6),
    act=ACTS,
)
class DenseLayer(nn.Module):
    def __init__(self, s: Shape, growth: int, act: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(s.channels)
        self.act = ACTIVATIONS[act]()
        self.conv = conv(s.channels, growth, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.act(self.norm(x)))], 1)


@kind(
    "image",
    after=lambda s, left, right: dataclasses.replace(s, channels=left + right + 2),
    left=(2, 4, 6),
    right=(4, 8, 12),
)
class Inception(nn.Module):
    def __init__(self, s: Shape, left: int, right: int) -> None:
        super().__init__()
        self.branch1 = nn.Conv2d(s.channels, left, 1)
        self.branch2 = nn.Sequential(nn.Conv2d(s.channels, right, 1), nn.ReLU(), conv(right, right), nn.ReLU())
        self.branch3 = nn.Conv2d(s.channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(pooled)], dim=1)


@kind("image", lambda s: s.size % 2 == 0, hidden=(4, 6, 8), style=("transposed", "nearest", "bilinear"), width=WIDTHS)
class UNet(nn.Module):
    def __init__(self, s: Shape, hidden: int, style: str, width: int) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.MaxPool2d(2), conv_norm_act(s.channels, hidden, 3, "batch", "relu"))
        self.up: nn.Module = nn.ConvTranspose2d(hidden, hidden, 2, stride=2)
        if style != "transposed":
            self.up = nn.Upsample(scale_factor=2, mode=style)
        self.merge = conv(s.channels + hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([x, self.up(self.down(x))], 1))


@kind("image", hidden=(4, 6, 8))
class SelectiveKernel(nn.Module):
    """Two branches weighed against each other per channel."""

    def __init__(self, s: Shape, hidden: int) -> None:
        super().__init__()
        self.small = nn.Conv2d(s.channels, s.channels, 1)
        self.large = conv(s.channels, s.channels)
        self.squeeze = nn.Linear(s.channels, hidden)
        self.choose = nn.Linear(hidden, 2 * s.channels)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.small(x), self.large(x)], 1)
        weights = self.choose(F.relu(self.squeeze(branches.sum(1).mean((2, 3)))))
        weights = weights.view(x.size(0), 2, -1).softmax(1)
        return (branches * weights[..., None, None]).sum(1)


@kind("any", act=("none", "relu", "sigmoid"), body=BODY, after=lambda s, body, **_: through(body, s))
class Residual(nn.Module):
    """A shortcut around other blocks, projected where the channels change."""

    def __init__(self, s: Shape, act: str, body: tuple[Block, ...]) -> None:
        super().__init__()
        outputs = through(body, s).channels
        self.body = stack(body, s)
        self.shortcut: nn.Module = nn.Identity()
        if outputs != s.channels:
            dense = {
                "image": lambda: nn.Conv2d(s.channels, outputs, 1),
                "tokens": lambda: nn.Linear(s.channels, outputs),
            }
            self.shortcut = dense[s.stream]()
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


@kind("any", width=WIDTHS, left=BODY, right=BODY)
class Branches(nn.Module):
    """Two branches of other blocks side by side."""

    def __init__(self, s: Shape, width: int, left: tuple[Block, ...], right: tuple[Block, ...]) -> None:
        super().__init__()
        self.left, self.right = stack(left, s), stack(right, s)
        both = through(left, s).channels + through(right, s).channels
        self.dim = 1 if s.stream == "image" else -1
        self.merge = nn.Conv2d(both, width, 1) if s.stream == "image" else nn.Linear(both, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([self.left(x), self.right(x)], dim=self.dim))


def through(blocks: tuple[Block, ...], shape: Shape) -> Shape:
    """Return the shape after ``blocks``."""
    for one in blocks:
        shape = shape_after(one, shape)
    return shape


def stack(blocks: tuple[Block, ...], shape: Shape) -> nn.Sequential:
    """Return the modules of ``blocks`` for an input of ``shape``."""
    return nn.Sequential(*(make(through(blocks[:i], shape), one) for i, one in enumerate(blocks)))


# --- Images: split, slice, shuffle ---


@kind("image", first=(2, 3, 5), rest=(4, 6), act=ACTS, width=WIDTHS)
class SplitAttribute(nn.Module):
    """Uneven sizes kept in an attribute."""

    def __init__(self, s: Shape, first: int, rest: int, act: str, width: int) -> None:
        super().__init__()
        self.sizes = [first, rest]
        self.conv = conv(s.channels, first + rest)
        self.act = ACTIVATIONS[act]()
        self.left = nn.Conv2d(first, width, 1)
        self.right = nn.Conv2d(rest, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.act(self.conv(x)), self.sizes, dim=1)
        return self.left(a) + self.right(b)


@kind("image", lambda s: s.channels >= 4)
class SplitShape(nn.Module):
    """Uneven sizes computed from the shape; the parts come back in another order."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.conv = conv(s.channels, s.channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        third = x.shape[1] // 3
        a, b = torch.split(x, [third, x.shape[1] - third], dim=1)
        return torch.cat([b, a.tanh()], 1)


@kind("image", width=WIDTHS)
class SplitConstant(nn.Module):
    """Uneven sizes written down."""

    def __init__(self, s: Shape, width: int) -> None:
        super().__init__()
        self.conv = conv(s.channels, 10)
        self.out = nn.Conv2d(10, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.conv(x), [2, 3, 5], dim=1)
        return self.out(torch.cat([a, c, F.relu(b)], 1))


@kind("image", lambda s: s.channels >= 4, width=WIDTHS, style=("attribute", "constant", "half"))
class SliceConv(nn.Module):
    def __init__(self, s: Shape, width: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.k = {"attribute": s.channels - 1, "constant": 3, "half": s.channels // 2}[style]
        self.conv = conv(self.k, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "half":
            return self.conv(x[:, : x.shape[1] // 2])
        if self.style == "constant":
            return self.conv(x[:, :3])
        return self.conv(x[:, : self.k])


@kind("image", width=(4, 5, 7, 12))
class Ghost(nn.Module):
    """Half the features are cheap copies, and what is too much is cut off."""

    def __init__(self, s: Shape, width: int) -> None:
        super().__init__()
        self.width = width
        primary = (width + 1) // 2
        self.primary = conv_norm_act(s.channels, primary, 1, "batch", "relu")
        self.cheap = conv_norm_act(primary, primary, 3, "batch", "relu", groups=primary)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], 1)[:, : self.width, :, :]


@kind("image", groups=lambda s: divisors(s.channels, 2, 3))
class ChannelShuffle(nn.Module):
    def __init__(self, s: Shape, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.conv1 = conv_norm_act(s.channels, 2 * groups * groups, 1, "batch", "relu", groups=groups)
        self.conv2 = nn.Conv2d(2 * groups * groups, s.channels, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        b, c, h, w = out.shape
        out = out.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return x + self.conv2(out)


@kind("image", lambda s: s.channels % 2 == 0, module_shuffle=(False, True))
class ShuffleUnit(nn.Module):
    """One half passes, the other is worked on, and both are interleaved."""

    def __init__(self, s: Shape, module_shuffle: bool) -> None:
        super().__init__()
        half = s.channels // 2
        self.branch = nn.Sequential(
            conv_norm_act(half, half, 1, "batch", "relu"),
            conv_norm_act(half, half, 3, "batch", "none", groups=half),
            conv_norm_act(half, half, 1, "batch", "relu"),
        )
        self.shuffle = nn.ChannelShuffle(2) if module_shuffle else None

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        out = torch.cat((x1, self.branch(x2)), dim=1)
        if self.shuffle is not None:
            return self.shuffle(out)
        return out.reshape(out.size(0), 2, -1, out.size(2), out.size(3)).transpose(1, 2).flatten(1, 2)


@kind("image", width=(4, 6, 8), style=("chunk", "slice", "glu", "split"))
class ChunkGate(nn.Module):
    def __init__(self, s: Shape, width: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.width = width
        self.conv = conv(s.channels, 2 * width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.style == "glu":
            return self.out(F.glu(y, dim=1))
        if self.style == "slice":
            return self.out(y[:, : self.width] * torch.tanh(y[:, self.width :]))
        a, b = y.chunk(2, dim=1) if self.style == "chunk" else torch.split(y, y.shape[1] // 2, dim=1)
        return self.out(a * torch.sigmoid(b))


@kind("image", width=(4, 5, 6), style=("each", "groups"))
class Maxout(nn.Module):
    def __init__(self, s: Shape, width: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.groups = width
        self.conv = conv(s.channels, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, h, w = x.shape
        if self.style == "each":
            return x.view(b, c // 2, 2, h, w).amax(2)
        return x.view(b, self.groups, -1, h, w).mean(2)


# --- Images: broadcast multiply, attention, norms over channels ---


@kind("image", hidden=(2, 3, 4), style=("conv", "linear", "hard"))
class SqueezeExcite(nn.Module):
    def __init__(self, s: Shape, hidden: int, style: str) -> None:
        super().__init__()
        self.style = style
        layer = nn.Linear if style == "linear" else lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1)
        self.fc1, self.fc2 = layer(s.channels, hidden), layer(hidden, s.channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "linear":
            b, c, _, _ = x.size()
            y = F.adaptive_avg_pool2d(x, 1).view(b, c)
            return x * torch.sigmoid(self.fc2(F.relu(self.fc1(y)))).view(b, c, 1, 1)
        y = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * (F.hardsigmoid(y) if self.style == "hard" else y.sigmoid())


@kind("image", style=("add", "multiply"))
class LayerScale(nn.Module):
    def __init__(self, s: Shape, style: str) -> None:
        super().__init__()
        self.style = style
        self.conv = conv(s.channels, s.channels)
        self.gamma = nn.Parameter(torch.ones(s.channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "multiply":
            return self.conv(x).mul(self.gamma)
        return x + self.gamma * self.conv(x)


@kind("image", style=("conv", "mean_max"))
class SpatialGate(nn.Module):
    def __init__(self, s: Shape, style: str) -> None:
        super().__init__()
        self.style = style
        self.conv = conv(s.channels if style == "conv" else 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.style == "mean_max":
            y = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(y))


@kind("image", hidden=(4, 6))
class GlobalContext(nn.Module):
    def __init__(self, s: Shape, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(s.channels, hidden), nn.GELU(), nn.Linear(hidden, s.channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x.mean((2, 3)))[:, :, None, None]


@kind("image", hidden=(4, 6, 8))
class NonLocal(nn.Module):
    def __init__(self, s: Shape, hidden: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(s.channels, hidden, 1)
        self.phi = nn.Conv2d(s.channels, hidden, 1)
        self.g = nn.Conv2d(s.channels, hidden, 1)
        self.out = nn.Conv2d(hidden, s.channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        theta, phi, g = self.theta(x).flatten(2), self.phi(x).flatten(2), self.g(x).flatten(2)
        weights = torch.softmax(theta.transpose(1, 2) @ phi, dim=-1)
        y = torch.bmm(g, weights.transpose(1, 2)).view(b, -1, h, w)
        return x + self.out(y)


@kind("image", lambda s: s.size % 2 == 0 and s.channels % 2 == 0, shift=(0, 1))
class WindowAttention(nn.Module):
    """Attention inside windows of two by two, rolled or not, in NHWC."""

    def __init__(self, s: Shape, shift: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.shift = shift
        self.norm = nn.LayerNorm(s.channels)
        self.qkv = nn.Linear(s.channels, 3 * s.channels)
        self.bias = nn.Parameter(torch.randn(2, 4, 4))
        self.proj = nn.Linear(s.channels, s.channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm(x.permute(0, 2, 3, 1))
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        b, h, w, c = x.shape
        x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        qkv = self.qkv(x).reshape(x.size(0), 4, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1) * (c // self.num_heads) ** -0.5 + self.bias.unsqueeze(0)).softmax(-1)
        x = self.proj((attn @ v).transpose(1, 2).reshape(-1, 4, c))
        x = x.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return shortcut + x.permute(0, 3, 1, 2)


@kind("image", hidden=(6, 8, 12), act=ACTS)
class ConvNeXt(nn.Module):
    """NHWC and back."""

    def __init__(self, s: Shape, hidden: int, act: str) -> None:
        super().__init__()
        self.dwconv = conv(s.channels, s.channels, groups=s.channels)
        self.norm = nn.LayerNorm(s.channels)
        self.pwconv1 = nn.Linear(s.channels, hidden)
        self.act = ACTIVATIONS[act]()
        self.pwconv2 = nn.Linear(hidden, s.channels)
        self.gamma = nn.Parameter(torch.ones(s.channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


@kind("image", style=("permute", "by_hand", "whole"))
class ChannelNorm(nn.Module):
    def __init__(self, s: Shape, style: str) -> None:
        super().__init__()
        self.style = style
        self.norm = nn.LayerNorm(list(s.sizes()[1:]) if style == "whole" else s.channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "whole":
            return self.norm(x)
        if self.style == "permute":
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.norm.eps)
        return self.norm.weight[:, None, None] * x + self.norm.bias[:, None, None]


@kind("any", style=("flip", "normalize", "softmax", "cumsum", "sort"))
class ChannelMix(nn.Module):
    """Operations along the channels, most of which no channel can leave."""

    def __init__(self, s: Shape, style: str) -> None:
        super().__init__()
        self.style = style
        self.dim = 1 if s.stream == "image" else 2

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "flip":
            return x.flip(self.dim)
        if self.style == "normalize":
            return F.normalize(x, dim=self.dim)
        if self.style == "softmax":
            return x + F.softmax(x, dim=self.dim)
        return x.cumsum(self.dim) if self.style == "cumsum" else x.sort(self.dim)[0]


# --- Images: space ---


@kind("image", lambda s: s.size >= 4, halved, moves=True, style=("max", "avg", "adaptive", "adaptive_max"))
class Pool(nn.Module):
    def __init__(self, s: Shape, style: str) -> None:
        super().__init__()
        side = (s.size + 1) // 2
        self.pool = {
            "max": nn.MaxPool2d(3, 2, 1),
            "avg": nn.AvgPool2d(2, ceil_mode=True),
            "adaptive": nn.AdaptiveAvgPool2d(side),
            "adaptive_max": nn.AdaptiveMaxPool2d((side, side)),
        }[style]

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


@kind("image", lambda s: s.size <= 4, doubled, moves=True, style=("nearest", "bilinear", "size"))
class Upsample(nn.Module):
    def __init__(self, s: Shape, style: str) -> None:
        super().__init__()
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "size":
            return F.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]), mode="bicubic", align_corners=True)
        return F.interpolate(x, scale_factor=2, mode=self.style)


@kind("image", width=WIDTHS, mode=("constant", "reflect", "circular"), value=(0.0, 1.0))
class PadConv(nn.Module):
    def __init__(self, s: Shape, width: int, mode: str, value: float) -> None:
        super().__init__()
        self.mode = mode
        self.value = value if mode == "constant" else None
        self.conv = nn.Conv2d(s.channels, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (1, 1, 1, 1), mode=self.mode, value=self.value))


@kind(
    "image",
    after=lambda s, extra: dataclasses.replace(s, channels=s.channels + extra),
    extra=up_to(2, 4),
)
class PaddedShortcut(nn.Module):
    """A shortcut without parameters: the new channels are zeros."""

    def __init__(self, s: Shape, extra: int) -> None:
        super().__init__()
        self.extra = extra
        self.conv = conv_norm_act(s.channels, s.channels + extra, 3, "batch", "none")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + F.pad(x, (0, 0, 0, 0, 0, self.extra)))


@kind("image", style=("roll", "flip", "center", "rotate"))
class Spatial(nn.Module):
    def __init__(self, s: Shape, style: str) -> None:
        super().__init__()
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "roll":
            return x + torch.roll(x, (1, 2), (2, 3))
        if self.style == "flip":
            return torch.flip(x, (3,))
        if self.style == "center":
            return x - x.mean(dim=(-2, -1), keepdim=True)
        return torch.rot90(x, 1, (2, 3))


# --- From images to tokens and back ---


@kind(
    "image",
    lambda s: 4 <= s.size <= 8,
    lambda s, width: Shape("tokens", width, (s.size // (2 if s.size < 8 else 3)) ** 2),
    moves=True,
    width=WIDTHS,
)
class PatchEmbedding(nn.Module):
    def __init__(self, s: Shape, width: int) -> None:
        super().__init__()
        side = 2 if s.size < 8 else 3
        self.proj = nn.Conv2d(s.channels, width, side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


@kind("image", lambda s: s.size <= 4, lambda s: Shape("tokens", s.channels, s.size**2), moves=True)
class Tokens(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, c, h * w).permute(0, 2, 1)


@kind(
    "image",
    lambda s: s.size >= 4,
    lambda s, style: Shape("tokens", s.channels, s.size),
    moves=True,
    style=("mean", "max"),
)
class Rows(nn.Module):
    """One token per row of the image."""

    def __init__(self, s: Shape, style: str) -> None:
        super().__init__()
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(3) if self.style == "mean" else x.max(dim=3).values
        return x.transpose(1, 2)


@kind(
    "tokens",
    lambda s: s.size in (4, 9),
    lambda s, **_: Shape("image", s.channels, 2 if s.size == 4 else 3),
    moves=True,
    style=("reshape", "unflatten"),
)
class Image(nn.Module):
    def __init__(self, s: Shape, style: str) -> None:
        super().__init__()
        self.style = style
        self.side = 2 if s.size == 4 else 3

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "unflatten":
            return x.mT.unflatten(2, (self.side, self.side))
        b, _, c = x.shape
        return x.permute(0, 2, 1).reshape(b, c, self.side, -1)


# --- Tokens: linear layers ---


@kind("tokens", width=WIDTHS, norm=(False, True), act=ACTS)
class LinearAct(nn.Module):
    def __init__(self, s: Shape, width: int, norm: bool, act: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(s.channels) if norm else nn.Identity()
        self.linear = nn.Linear(s.channels, width)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(self.norm(x)))


@kind("tokens", hidden=WIDTHS, act=ACTS, times=(1, 2))
class MLP(nn.Module):
    """With a shortcut; run twice with the same weights where ``times`` is 2."""

    def __init__(self, s: Shape, hidden: int, act: str, times: int) -> None:
        super().__init__()
        self.times = times
        self.norm = nn.LayerNorm(s.channels)
        self.fc1 = nn.Linear(s.channels, hidden)
        self.act = ACTIVATIONS[act]()
        self.fc2 = nn.Linear(hidden, s.channels)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.fc2(self.act(self.fc1(self.norm(x))))
        return x


@kind("tokens", hidden=(4, 6, 8), style=("two", "chunk", "attribute", "constant"))
class GatedMLP(nn.Module):
    def __init__(self, s: Shape, hidden: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.hidden = 6 if style == "constant" else hidden
        self.norm = nn.LayerNorm(s.channels)
        self.up = nn.Linear(s.channels, self.hidden * (1 if style == "two" else 2))
        self.gate = nn.Linear(s.channels, self.hidden) if style == "two" else None
        self.down = nn.Linear(self.hidden, s.channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.gate is not None:
            return x + self.down(F.silu(self.gate(y)) * self.up(y))
        y = self.up(y)
        if self.style == "chunk":
            a, b = y.chunk(2, -1)
        elif self.style == "attribute":
            a, b = y.split([self.hidden, self.hidden], dim=-1)
        else:
            a, b = y[..., :6], y[..., 6:]
        return x + self.down(a * torch.sigmoid(b))


@kind("tokens", hidden=(4, 6, 8), style=("shared", "transposed"))
class TiedLinear(nn.Module):
    def __init__(self, s: Shape, hidden: int, style: str) -> None:
        super().__init__()
        self.enter = nn.Linear(s.channels, hidden)
        self.fc1 = nn.Linear(hidden, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        if style == "shared":
            self.fc2.weight = self.fc1.weight
        self.transposed = style == "transposed"

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.fc2(F.gelu(self.fc1(self.enter(x)))))
        if self.transposed:
            return x + F.linear(y, self.enter.weight.t())
        return x + y @ self.enter.weight


@kind("tokens", width=WIDTHS, style=("matmul", "linear", "einsum"))
class BareLinear(nn.Module):
    def __init__(self, s: Shape, width: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.w = nn.Parameter(torch.randn(s.channels, width))
        self.b = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "matmul":
            return F.relu(x @ self.w + self.b)
        if self.style == "einsum":
            return (torch.einsum("bnc,cd->bnd", x, self.w) + self.b).tanh()
        return F.linear(x, self.w.t(), self.b)


@kind("tokens", hidden=(4, 6, 9), style=("flatten", "reshape"))
class FlattenMLP(nn.Module):
    """All features of a sample in one row and back."""

    def __init__(self, s: Shape, hidden: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.n = s.size
        self.fc1 = nn.Linear(s.size * s.channels, hidden)
        self.fc2 = nn.Linear(hidden, s.size * s.channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.fc1(x.flatten(1) if self.style == "flatten" else x.reshape(x.shape[0], -1)))
        return x + self.fc2(y).view(x.shape[0], self.n, -1)


@kind("tokens", hidden=(4, 6, 8))
class Mixer(nn.Module):
    """A linear layer across the tokens."""

    def __init__(self, s: Shape, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(s.channels)
        self.fc1 = nn.Linear(s.size, hidden)
        self.fc2 = nn.Linear(hidden, s.size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).transpose(1, 2)
        return x + self.fc2(F.gelu(self.fc1(y))).transpose(1, 2)


@kind("tokens", width=(4, 6, 8, 12), kernel=(3, 1), norm=("none", "batch", "group"), groups=(1, 2), act=ACTS)
class Conv1d(nn.Module):
    def __init__(self, s: Shape, width: int, kernel: int, norm: str, groups: int, act: str) -> None:
        super().__init__()
        self.enter = nn.Conv1d(s.channels, width, 1)
        self.conv = nn.Conv1d(width, width, kernel, padding="same", groups=groups)
        self.norm = {"none": nn.Identity(), "batch": nn.BatchNorm1d(width), "group": nn.GroupNorm(2, width)}[norm]
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(self.enter(x.transpose(1, 2))))
        return self.act(self.norm(x)).transpose(1, 2)


# --- Tokens: norms, scales, cuts ---


@kind("tokens", style=("layer", "batch", "group", "instance", "rms", "by_hand"))
class TokenNorm(nn.Module):
    def __init__(self, s: Shape, style: str) -> None:
        super().__init__()
        self.style = style
        self.norm: nn.Module = {
            "layer": lambda c: nn.LayerNorm(c, bias=False),
            "batch": nn.BatchNorm1d,
            "group": lambda c: nn.GroupNorm(2 if c % 2 == 0 else 1, c),
            "instance": lambda c: nn.InstanceNorm1d(c, affine=True),
            "rms": lambda c: nn.RMSNorm(c, eps=1e-6),
            "by_hand": lambda c: nn.Identity(),
        }[style](s.channels)
        self.weight = nn.Parameter(torch.ones(s.channels)) if style == "by_hand" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.style in ("layer", "rms"):
            return self.norm(x)
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


@kind("tokens", style=("scale", "gate", "excite"))
class TokenScale(nn.Module):
    def __init__(self, s: Shape, style: str) -> None:
        super().__init__()
        self.style = style
        self.linear = nn.Linear(s.channels, 1 if style == "gate" else s.channels)
        self.gamma = nn.Parameter(torch.ones(s.channels)) if style == "scale" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gamma is not None:
            return x + self.gamma * self.linear(x)
        if self.style == "gate":
            return x * torch.sigmoid(self.linear(x))
        return x * torch.sigmoid(self.linear(x.mean(1, keepdim=True))).expand_as(x)


@kind(
    "tokens",
    after=lambda s, growth: dataclasses.replace(s, channels=s.channels + growth),
    growth=up_to(2, 3, 6),
)
class TokenConcat(nn.Module):
    def __init__(self, s: Shape, growth: int) -> None:
        super().__init__()
        self.linear = nn.Linear(s.channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(self.linear(x)), x], dim=-1)


@kind("tokens", width=(4, 6, 8), style=("attribute", "shape", "constant"))
class TokenSplit(nn.Module):
    def __init__(self, s: Shape, width: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.k = 3
        self.linear = nn.Linear(s.channels, 7)
        self.left, self.right = nn.Linear(3, width), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.linear(x))
        if self.style == "attribute":
            a, b = y[..., : self.k], y[..., self.k :]
        elif self.style == "shape":
            a, b = y.split([y.shape[-1] // 2, y.shape[-1] - y.shape[-1] // 2], -1)
        else:
            a, b = y.narrow(2, 0, 3), y.narrow(2, 3, 4)
        return self.left(a) + self.right(b)


@kind(
    "tokens",
    after=lambda s, token: dataclasses.replace(s, size=s.size + token),
    moves=True,
    token=lambda s: (0, 1) if s.size < 9 else (0,),
)
class Position(nn.Module):
    """Positions, and a class token in front or not."""

    def __init__(self, s: Shape, token: int) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, s.channels)) if token else None
        self.pos = nn.Parameter(torch.randn(1, s.size + token, s.channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.pos


# --- Tokens: attention ---


@kind("tokens", lambda s: s.channels % 2 == 0, sdpa=(False, True), bias=(False, True), out=("reshape", "flatten"))
class Attention(nn.Module):
    """Heads and their features in attributes, one layer for q, k and v."""

    def __init__(self, s: Shape, sdpa: bool, bias: bool, out: str) -> None:
        super().__init__()
        self.h, self.d = 2, s.channels // 2
        self.sdpa = sdpa
        self.out = out
        self.qkv = nn.Linear(s.channels, 3 * s.channels)
        self.proj = nn.Linear(s.channels, s.channels)
        self.bias = nn.Parameter(torch.randn(2, s.size, s.size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.h, self.d).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            scores = (q * self.d**-0.5) @ k.transpose(-2, -1)
            if self.bias is not None:
                scores = scores + self.bias
            y = scores.softmax(dim=-1) @ v
        y = y.transpose(1, 2)
        return x + self.proj(y.reshape(B, N, C) if self.out == "reshape" else y.flatten(2))


@kind("tokens", heads=lambda s: divisors(s.channels, 2, 3, 4), sdpa=(False, True))
class NumHeadsAttention(nn.Module):
    """``C // self.num_heads`` and three layers."""

    def __init__(self, s: Shape, heads: int, sdpa: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.sdpa = sdpa
        self.query = nn.Linear(s.channels, s.channels)
        self.key = nn.Linear(s.channels, s.channels)
        self.value = nn.Linear(s.channels, s.channels)
        self.out = nn.Linear(s.channels, s.channels)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q = self.query(x).view(B, N, self.num_heads, C // self.num_heads).transpose(1, 2)
        k = self.key(x).view(B, N, self.num_heads, C // self.num_heads).transpose(1, 2)
        v = self.value(x).view(B, N, self.num_heads, C // self.num_heads).transpose(1, 2)
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / (C // self.num_heads) ** 0.5, -1) @ v
        return x + self.out(y.transpose(1, 2).contiguous().view(B, N, C))


@kind("tokens", heads=(2, 3), style=("attribute", "constant", "free"))
class InnerAttention(nn.Module):
    """Features of the heads apart from those of the stream: a head has four."""

    def __init__(self, s: Shape, heads: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.heads = heads
        self.norm = nn.LayerNorm(s.channels)
        self.to_qkv = nn.Linear(s.channels, 3 * 4 * heads, bias=False)
        self.to_out = nn.Linear(4 * heads, s.channels)

    def split_heads(self, t: Tensor) -> Tensor:
        b, n, _ = t.shape
        if self.style == "constant":
            return t.view(b, n, self.heads, 4).transpose(1, 2)
        if self.style == "attribute":
            return t.reshape(b, n, self.heads, -1).transpose(1, 2)
        return t.unflatten(-1, (-1, 4)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.split_heads, self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(y.transpose(1, 2).flatten(2))


@kind("tokens", groups=(2, 1), each=(2, 3), style=("expand", "repeat", "sdpa"))
class GroupedQueryAttention(nn.Module):
    """Several heads of queries share keys and values."""

    def __init__(self, s: Shape, groups: int, each: int, style: str) -> None:
        super().__init__()
        self.style = style
        self.n_heads, self.n_kv_heads, self.head_dim = groups * each, groups, 4
        self.wq = nn.Linear(s.channels, 4 * self.n_heads, bias=False)
        self.wk = nn.Linear(s.channels, 4 * self.n_kv_heads, bias=False)
        self.wv = nn.Linear(s.channels, 4 * self.n_kv_heads, bias=False)
        self.wo = nn.Linear(4 * self.n_heads, s.channels, bias=False)

    def repeat_kv(self, t: Tensor) -> Tensor:
        b, heads, n, d = t.shape
        repeats = self.n_heads // self.n_kv_heads
        if self.style == "repeat":
            return t.repeat_interleave(repeats, dim=1)
        return t[:, :, None].expand(b, heads, repeats, n, d).reshape(b, heads * repeats, n, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.wq(x).view(b, n, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(b, n, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(b, n, self.n_kv_heads, self.head_dim).transpose(1, 2)
        if self.style == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, self.repeat_kv(k), self.repeat_kv(v))
        return x + self.wo(y.transpose(1, 2).reshape(b, n, -1))


@kind("tokens", heads=lambda s: divisors(s.channels, 2, 3), batch_first=(True, False), weights=(False, True))
class MultiHeadAttention(nn.Module):
    def __init__(self, s: Shape, heads: int, batch_first: bool, weights: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.weights = weights
        self.attention = nn.MultiheadAttention(s.channels, heads, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return x + self.attention(x, x, x, need_weights=self.weights)[0]
        t = x.transpose(0, 1)
        y, _ = self.attention(t, t, t, need_weights=self.weights)
        return x + y.transpose(0, 1)


@kind(
    "tokens",
    lambda s: s.channels % 2 == 0,
    lambda s, queries: dataclasses.replace(s, size=queries),
    moves=True,
    queries=(4, 5),
)
class PoolingAttention(nn.Module):
    """Learned queries look at the tokens."""

    def __init__(self, s: Shape, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, s.channels))
        self.attention = nn.MultiheadAttention(s.channels, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.expand(x.shape[0], -1, -1)
        return q + self.attention(q, x, x)[0]


@kind("tokens", lambda s: s.channels % 2 == 0, hidden=(6, 8, 12), norm_first=(False, True))
class EncoderLayer(nn.Module):
    def __init__(self, s: Shape, hidden: int, norm_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            s.channels, 2, hidden, dropout=0.0, batch_first=True, norm_first=norm_first
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


# --- Tokens: recurrence ---


def recurred(shape: Shape, hidden: int, bidirectional: bool, **_: Any) -> Shape:
    return dataclasses.replace(shape, channels=hidden * (2 if bidirectional else 1))


RECURRENT = {
    "cell": ("LSTM", "GRU", "RNN"),
    "hidden": (4, 5, 6),
    "layers": (1, 2),
    "bidirectional": (False, True),
    "batch_first": (True, False),
}


def recurrent(s: Shape, cell: str, hidden: int, layers: int, bidirectional: bool, batch_first: bool) -> nn.Module:
    """Return a recurrent layer; ``RNN`` has tanh."""
    return getattr(nn, cell)(s.channels, hidden, layers, bidirectional=bidirectional, batch_first=batch_first)


@kind("tokens", after=recurred, **RECURRENT)
class Recurrent(nn.Module):
    """All steps."""

    def __init__(self, s: Shape, **options: Any) -> None:
        super().__init__()
        self.rnn = recurrent(s, **options)
        self.batch_first = options["batch_first"]

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return self.rnn(x)[0]
        out, _ = self.rnn(x.transpose(0, 1))
        return out.transpose(0, 1)


@kind("tokens", **RECURRENT, style=("state", "step"))
class LastStep(nn.Module):
    """The last hidden state of the uppermost layer, or the last step, added to every token."""

    def __init__(self, s: Shape, style: str, **options: Any) -> None:
        super().__init__()
        self.style = style
        self.batch_first = options["batch_first"]
        self.rnn = recurrent(s, **options)
        directions = 2 if options["bidirectional"] else 1
        self.linear = nn.Linear(options["hidden"] * (directions if style == "step" else 1), s.channels)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.rnn(x if self.batch_first else x.transpose(0, 1))
        if self.style == "step":
            return x + self.linear(out[:, -1] if self.batch_first else out[-1]).unsqueeze(1)
        hidden = state[0] if isinstance(state, tuple) else state
        return x + self.linear(hidden[-1]).unsqueeze(1)


# --- Stem, head, network ---

HEADS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "image": {
        "mean": lambda x: x.mean((2, 3)),
        "flatten": lambda x: x.flatten(1),
        "pool": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        "reshape": lambda x: x.reshape(x.size(0), -1),
        "squeeze": lambda x: F.adaptive_max_pool2d(x, 1).squeeze(-1).squeeze(-1),
    },
    "tokens": {
        "mean": lambda x: x.mean(1),
        "flatten": lambda x: x.flatten(1),
        "last": lambda x: x[:, -1],  # the first may be a class token that has seen nothing
        "max": lambda x: x.max(1).values,
    },
}
SECOND = ("none", "add", "concat", "scale")
OUTPUTS = ("tensor", "tuple", "dict", "auxiliary")


def entry(stream: str, width: int) -> nn.Module:
    """Return the first layer of a stream."""
    return nn.Linear(ENTRIES["tokens"], width) if stream == "tokens" else conv(ENTRIES["image"], width)


class TrainingHead(nn.Module):
    """Answers in train mode only."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor | None:
        return self.linear(x) if self.training else None


class Model(nn.Module):
    """What :func:`build` returns: a stem, blocks, a head; one input."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        shape, middle = network.stem_shape(), len(network.blocks) // 2
        self.outputs = network.outputs
        self.stem = entry(network.stream, network.width)
        self.blocks = stack(network.blocks, shape)
        self.middle = middle
        if network.outputs in ("dict", "auxiliary"):
            at = through(network.blocks[:middle], shape)
            self.auxiliary = (TrainingHead if network.outputs == "auxiliary" else nn.Linear)(at.channels, CLASSES)
            self.auxiliary_pool = HEADS[at.stream]["mean"]
        last = through(network.blocks, shape)
        self.pool = HEADS[last.stream][network.head]
        features = last.channels * (
            last.size ** (len(last.sizes()) - 2) if network.head in ("flatten", "reshape") else 1
        )
        self.hidden = nn.Linear(features, network.hidden) if network.hidden else None
        self.classifier = nn.Linear(network.hidden or features, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.rest(F.relu(self.stem(x)))

    def rest(self, x: Tensor) -> Any:
        """Everything after the stem."""
        for one in self.blocks[: self.middle]:
            x = one(x)
        between = x
        for one in self.blocks[self.middle :]:
            x = one(x)
        row = self.pool(F.gelu(x))  # the mean over what an instance norm has centered would be a constant
        logits = self.classifier(row if self.hidden is None else F.gelu(self.hidden(row)))
        if self.outputs == "tuple":
            return logits, row
        if self.outputs == "dict":
            return {"logits": logits, "auxiliary": self.auxiliary(self.auxiliary_pool(F.gelu(between)))}
        if self.outputs == "auxiliary":
            extra = self.auxiliary(self.auxiliary_pool(F.gelu(between)))
            return logits if extra is None else (logits, extra)
        return logits


class ModelOfTwo(Model):
    """A second input of the same stream is added or concatenated, or a row ``[B, 7]`` scales the channels."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.second = network.second
        self.is_image = network.stream == "image"
        self.stem2 = entry(network.stream, network.width)
        if network.second == "scale":
            self.stem2 = nn.Linear(CONDITIONS, network.width)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        x, y = F.relu(self.stem(x)), self.stem2(y)
        if self.second == "scale":
            return self.rest(x * (1 + (y[:, :, None, None] if self.is_image else y[:, None])))
        if self.second == "add":
            return self.rest(x + y)
        return self.rest(torch.cat([x, y], 1 if self.is_image else 2))


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw weights that keep the scale of what passes, and norms that differ from the identity."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_().mul_((parameter.shape[0] / parameter.numel()) ** 0.5)
        elif "bias" in name:
            parameter.normal_(0, 0.3)
        else:
            parameter.uniform_(0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


def build(network: Network) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Build a network; the global generator stays as it is.

    Args:
        network: What to build.

    Returns:
        The module, float64 and in evaluation mode, and its positional inputs. Equal descriptions give equal tensors.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(network.seed)
        model = (Model if network.second == "none" else ModelOfTwo)(network).double()
        randomize(model)
        sizes = Shape(network.stream, ENTRIES[network.stream], network.size).sizes()
        inputs = (torch.randn(sizes, dtype=torch.float64),)
        if network.second != "none":
            inputs += (torch.randn((BATCH, CONDITIONS) if network.second == "scale" else sizes, dtype=torch.float64),)
    return model.eval(), inputs


# --- Strategy ---


def pick(draw: Any, choices: Sequence[Any], *place: Any) -> Any:
    """Draw one of ``choices``, in a way that no other ``place`` of the network does.

    Hypothesis likes to copy one draw onto another of the same kind, which made half of its networks near copies of others.
    """
    return draw(st.sampled_from([(place, choice) for choice in choices]))[1]


def draw_block(draw: Any, shape: Shape, *place: Any, nested: bool = False) -> Block:
    """Draw a block for an input of ``shape``; a ``nested`` one keeps stream and size and holds no blocks."""
    names = [name for name, one in KINDS.items() if one.fits(shape) and not (nested and (one.moves or one.composite))]
    names += [name for name in names if KINDS[name].composite]  # what others stand in deserves two shares
    names.sort(key=lambda name: KINDS[name].conditional)  # the others keep their place while shapes shrink
    name = pick(draw, names, *place)
    options = {
        option: draw_body(draw, shape, *place, option) if choices == BODY else pick(draw, choices, *place, option)
        for option, choices in KINDS[name].choices(shape).items()
    }
    return block(name, **options)


def draw_body(draw: Any, shape: Shape, *place: Any) -> tuple[Block, ...]:
    """Draw the one or two blocks inside a composite."""
    blocks: tuple[Block, ...] = ()
    for i in range(pick(draw, (1, 2), *place)):
        blocks += (draw_block(draw, through(blocks, shape), *place, i, nested=True),)
    return blocks


@st.composite
def networks(draw: Any, fewest: int = 3, most: int = 7) -> Network:
    """Draw networks of ``fewest`` to ``most`` blocks."""
    stream = pick(draw, ("image", "tokens"), "stream")
    size = pick(draw, (6, 7, 8, 4) if stream == "image" else range(4, 10), "size")
    second = pick(draw, SECOND[:1] * 3 + SECOND, "second")
    width = pick(draw, [one for one in WIDTHS if second != "concat" or 2 * one <= MOST], "width")
    start = Network(stream, size, width, (), second=second)
    blocks: tuple[Block, ...] = ()
    while len(blocks) < most and (len(blocks) < fewest or pick(draw, (False, True, True, True), "more", len(blocks))):
        blocks += (draw_block(draw, through(blocks, start.stem_shape()), len(blocks)),)
    end = through(blocks, start.stem_shape())
    return dataclasses.replace(
        start,
        blocks=blocks,
        head=pick(draw, tuple(HEADS[end.stream]), "head"),
        hidden=pick(draw, (0, 8), "hidden"),
        outputs=pick(draw, OUTPUTS[:1] * 3 + OUTPUTS, "outputs"),
        seed=pick(draw, range(100), "seed"),
    )


# --- What an engine is expected to remove ---


def smooth(options: dict[str, Any]) -> bool:
    """Whether a masked hidden channel stays zero, or a whole group of it may go: the convolution behind it pads with zeros."""
    norm, hidden = options.get("norm", "none"), options.get("hidden", 0)
    return options["act"] in ZERO_AT_ZERO and norm != "batch_bare" and (norm != "group" or hidden % 2 == 0)


#: Whether a block of the kind must lose units, whatever stands around it: it has hidden channels, features or heads of its own. Where
#: it is ``False``, its outputs may still go with those of its neighbours, or the sizes in its Python may turn out to allow more.
LOSES: dict[str, bool | Callable[[dict[str, Any]], bool]] = {
    # only channels of the stream pass
    **dict.fromkeys(("Conv", "StridedConv", "GroupedConv", "DepthwiseSeparable", "BareConv", "TransposedConv"), False),
    **dict.fromkeys(
        ("UpConv", "PixelShuffle", "SpaceToDepth", "DenseLayer", "Maxout", "LayerScale", "SpatialGate"), False
    ),
    **dict.fromkeys(
        ("Pool", "Upsample", "PadConv", "PaddedShortcut", "Spatial", "PatchEmbedding", "Tokens", "Rows"), False
    ),
    **dict.fromkeys(("Image", "LinearAct", "BareLinear", "TokenScale", "TokenConcat", "Position", "Recurrent"), False),
    # sizes in Python or norms over the channels stand in the way, or may
    **dict.fromkeys(("SplitAttribute", "SplitShape", "SplitConstant", "SliceConv", "Ghost", "ChannelShuffle"), False),
    **dict.fromkeys(
        ("WindowAttention", "NumHeadsAttention", "TokenSplit", "ChannelNorm", "ChannelMix", "TokenNorm"), False
    ),
    "WeightNormConv": False,  # the parametrization computes the weight
    # hidden channels and features
    "ConvTwice": True,
    "BasicBlock": smooth,
    "Bottleneck": smooth,
    "InvertedResidual": smooth,
    "Inception": True,
    "UNet": True,
    "SelectiveKernel": True,
    "ShuffleUnit": True,
    "ChunkGate": lambda options: options["style"] != "slice",
    "SqueezeExcite": True,
    "GlobalContext": True,
    "NonLocal": True,
    "ConvNeXt": True,  # f(0) != 0 is absorbed into the bias of a linear layer
    "MLP": True,
    "GatedMLP": lambda options: options["style"] in ("two", "chunk"),
    "TiedLinear": True,
    "FlattenMLP": True,
    "Mixer": True,
    "Conv1d": lambda options: options["groups"] == 1,  # else whole groups leave, if the blocks behind let them
    "EncoderLayer": True,
    "LastStep": True,
    # heads
    "Attention": lambda options: options["out"] == "flatten",
    "InnerAttention": True,
    "GroupedQueryAttention": lambda options: options["groups"] > 1,
    "MultiHeadAttention": True,
    "PoolingAttention": True,
    # what their bodies lose
    "Residual": False,
    "Branches": False,
}


def loses(network: Network) -> bool:
    """Whether some block of the network, or inside one, must lose units by :data:`LOSES`."""
    table = ((LOSES[one.kind], dict(one.options)) for one in walk(network.blocks))
    return any(rule(options) if callable(rule) else rule for rule, options in table)
