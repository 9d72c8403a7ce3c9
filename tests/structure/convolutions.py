"""What tests of replaced convolutions and linear layers share: inputs, padding modes, a note of torch that is none of ours."""

import torch
from torch import Tensor, nn

EVEN = "ignore:Using padding='same' with even kernel lengths:UserWarning"  # torch's note on its own uneven padding
MODES = ("zeros", "reflect", "replicate", "circular")
SIZE = {nn.Conv1d: (11,), nn.Conv2d: (9, 10), nn.Conv3d: (6, 7, 5)}


def example(layer, batch: int = 2) -> Tensor:
    """Return an input for a layer, always the same, of the type of its weight."""
    generator = torch.Generator().manual_seed(1)
    size = (3, 5, layer.in_features) if isinstance(layer, nn.Linear) else (batch, layer.in_channels, *SIZE[type(layer)])
    return torch.randn(size, generator=generator, dtype=torch.float64).to(layer.weight.dtype)
