"""What units are, in words: channels, hidden units, heads, groups.

Heads and groups are told by the number that follows when a unit leaves: an attribute that is called after heads, or the number of groups of a
grouped convolution. Where a unit holds several channels of a layer and no such number follows, it is called a unit.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch import nn

from lightning_prune.structure.groups import Group, Structure
from lightning_prune.structure.tracing.labels import Size

_NOUNS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.RNNBase, nn.RNNCellBase), "hidden units"),
    ((nn.Linear, nn.Bilinear), "outputs"),
    ((nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm), "features"),
    ((nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU), "channels"),
)
_MOVING = {"outputs": "hidden units", "values": "channels"}  # what they are called where some can leave
_WIDTHS = ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim")


@dataclasses.dataclass(frozen=True)
class Follower:
    """An attribute of a module that follows when units leave.

    Attributes:
        module: Name of the module.
        attribute: Name of the attribute.
        drop: By how much it falls with every unit; None where units share it.
    """

    module: str
    attribute: str
    drop: int | None

    @property
    def counts_heads(self) -> bool:
        """Whether its name says that it is a number of heads, not the width of one or of all."""
        name = self.attribute.lower()
        return "head" in name and not any(word in name for word in ("dim", "size", "width", "feature", "channel"))

    def seen_from(self, layer: str) -> str:
        """Return its name as it is written beside a layer: the module is named where it is another one."""
        return self.attribute if self.module == layer else f"{self.module}.{self.attribute}".lstrip(".")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the units of a group are.

    Attributes:
        noun: ``"heads"`` or ``"groups"``; None where no number says so.
        width: Channels of a head.
        heads: Heads per unit, more than one where several query heads share a key and a value.
        followers: The attributes that follow.
    """

    noun: str | None
    width: int
    heads: int
    followers: tuple[Follower, ...]


def kinds_of(model: nn.Module, structure: Structure) -> list[Kind]:
    """Return what the units of every group are.

    Args:
        model: The model.
        structure: Its units.
    """
    found: list[list[Follower]] = [_attention(model, structure, group) for group in structure.groups]
    group_of = np.full(structure.count + 1, -1)  # the last one is for what never leaves
    for index, group in enumerate(structure.groups):
        group_of[group.units] = index
    for size in structure.sizes:
        if size.attribute is not None:
            for index in np.unique(group_of[size.labels]).tolist():
                if index >= 0:
                    found[index].append(_follower(size, size.attribute, structure.groups[index]))
    return [_kind(group, tuple(dict.fromkeys(own))) for group, own in zip(structure.groups, found, strict=True)]


def _kind(group: Group, followers: tuple[Follower, ...]) -> Kind:
    heads = [f.drop for f in followers if f.drop and f.counts_heads]
    grouped = any(f.drop == 1 and f.attribute in ("groups", "num_groups") for f in followers)
    return Kind("heads" if heads else "groups" if grouped else None, group.width, max(heads, default=1), followers)


def _follower(size: Size, attribute: str, group: Group) -> Follower:
    rows = size.labels.reshape(len(size.labels), -1)
    whole = rows[(rows == rows[:, :1]).all(1)][:, 0]
    drops = {int((whole == unit).sum()) for unit in group.units[:2]}
    return Follower(size.module, attribute, (drops.pop() or None) if len(drops) == 1 else None)


def _attention(model: nn.Module, structure: Structure, group: Group) -> list[Follower]:
    """Return the numbers of heads of torch's attention, which are computed from the rows that stay."""
    found = []
    for slot in (structure.slots[index] for index in group.slots):
        name, _, key = slot.tensor.rpartition(".")
        parts = {"in_proj_weight": 3, "v_proj_weight": 1}.get(key)
        module = model.get_submodule(name) if parts else None
        if isinstance(module, nn.MultiheadAttention) and slot.axis == 0:
            rows = int((slot.units == group.units[0]).sum())
            found.append(Follower(name, "num_heads", rows // (parts * module.head_dim)))
    return found


def noun_of(module: nn.Module) -> str:
    """Return what the outputs of a layer are called; of a module that is not torch's own only that it holds values is known."""
    return next((noun for types, noun in _NOUNS if isinstance(module, types)), "values")


def in_words(module: nn.Module, kinds: Sequence[tuple[Kind, int, int]], fixed: int) -> str:
    """Say what the units of a layer are.

    Args:
        module: The layer.
        kinds: Per group that it writes: what its units are, how many, and how many channels of this layer each holds.
        fixed: How many of its channels are no units.

    >>> in_words(nn.Conv2d(3, 64, 3), [(Kind(None, 1, 1, ()), 40, 1)], 24)
    '64 channels'
    """
    if isinstance(module, nn.MultiheadAttention) and not kinds:
        return f"{module.num_heads} heads of {module.head_dim}"
    noun = _MOVING.get(noun_of(module), noun_of(module)) if kinds else noun_of(module)
    counts = {("", noun): fixed} if fixed else {}
    for kind, units, width in kinds:
        name = _name(module, kind, width, noun)
        counts[name] = counts.get(name, 0) + units
    return " + ".join(f"{n} {one.removesuffix('s') if n == 1 else one}{of}" for (of, one), n in counts.items())


def _name(module: nn.Module, kind: Kind, width: int, noun: str) -> tuple[str, str]:
    """Return of what a unit consists, and what several of them are called."""
    if kind.noun == "heads":
        return (
            (f" of {kind.width}", "heads") if kind.heads == 1 else (f" of {kind.heads} heads of {kind.width}", "groups")
        )
    if isinstance(module, nn.Linear | nn.Bilinear):
        width = kind.width  # a gated layer holds two rows per hidden unit
    if kind.noun is None and (width == 1 or isinstance(module, nn.RNNBase | nn.RNNCellBase)):
        return "", noun
    inner = noun.replace("hidden units", "channels")
    return f" of {width} {inner.removesuffix('s') if width == 1 else inner}", kind.noun or "units"


def width_of(module: nn.Module, size: int, params: int) -> int:
    """Return how many outputs a layer has.

    Args:
        module: The layer.
        size: What to return where a layer of torch's own does not say.
        params: Number of its parameters, the values of any other module.
    """
    if isinstance(module, nn.RNNBase):
        return module.hidden_size * module.num_layers * (2 if module.bidirectional else 1)
    if isinstance(module, nn.RNNCellBase):
        return module.hidden_size
    if noun_of(module) == "values":
        return params
    return next((v for key in _WIDTHS if type(v := getattr(module, key, None)) is int), size)
