"""What rotated layers are worth in time on onnxruntime's CPU provider; run with ``-m benchmark -s``.

Three factors of a 3x3 convolution beside the convolution, by width, resolution and share of directions kept; and a whole network of such layers that
KFE brought to half of its multiply-adds, beside the dense one. Dense and rotated run in one process, in turn.
"""

import pytest
import torch
from lightning_prune.export import export_onnx
from lightning_prune.export.latency import time_round
from lightning_prune.export.runtime import open_session
from torch import nn
from torch.nn import functional as F

from lightning_prune import KFE, compress, count_flops
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.rotated import Directions
from lightning_prune.structure.steps import Rotate
from lightning_prune.structure.surgery import compact

SHARES = (0.75, 0.5, 0.25)


def paired(models, x, folder, runs=60):
    """Return the least milliseconds of every model, timed in turn."""
    bound = {}
    for name, model in models.items():
        export_onnx(model, folder / f"{name}.onnx", example_inputs=x)
        session = open_session(folder / f"{name}.onnx", "cpu")
        bound[name] = session.bind({session.inputs[0].name: x.numpy()})
    return {name: times.min() for name, times in time_round(bound, warmup=5, runs=runs).items()}


@pytest.mark.benchmark
@pytest.mark.parametrize("channels", [32, 64, 128, 256])
@pytest.mark.parametrize(("batch", "size"), [(1, 8), (1, 16), (1, 32), (16, 16)])
@pytest.mark.filterwarnings("ignore")
def test_speed_of_three_factors_over_the_share_of_directions_kept(channels, batch, size, tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()).eval()
    x, models = torch.randn(batch, channels, size, size), {"dense": dense}
    for share in SHARES:
        bases = [torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q for _ in range(2)]
        step = Rotate.of("0", dense[0], Directions(*(basis[:, : int(share * channels)] for basis in bases)))
        models[str(share)] = compact(dense, Plan((step,)))
    least = paired(models, x, tmp_path)
    row = "  ".join(f"{share:.0%}: {least['dense'] / least[str(share)]:.2f}" for share in SHARES)
    print(f"\n{channels} channels, {batch}x{size}x{size}: {row}", end="")


@pytest.mark.benchmark
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.filterwarnings("ignore")
def test_a_network_at_half_the_flops_is_faster_than_dense(width, batch, tmp_path):
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for inner, outer, stride in [
        (width, width, 1),
        (width, 2 * width, 2),
        (2 * width, 2 * width, 1),
        (2 * width, 4 * width, 2),
    ]:
        layers += [nn.Conv2d(inner, outer, 3, padding=1, stride=stride), nn.BatchNorm2d(outer), nn.ReLU()]
    dense = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)).eval()
    x = torch.randn(16, 3, 32, 32)
    data = [(torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))) for _ in range(4)]
    loss = lambda model, b: F.cross_entropy(model(b[0]), b[1])  # noqa: E731
    small, _ = compress(dense, KFE(flops=0.5, recalibrate_bn=0), x, data, loss)
    least = paired({"dense": dense, "small": small}, x[:batch], tmp_path, runs=40)
    share = count_flops(small, x).total / count_flops(dense, x).total
    print(
        f"\nwidth {width}, batch {batch}: {least['dense'] / least['small']:.2f} times as fast at {share:.1%} of the multiply-adds",
        end="",
    )
    assert least["small"] < least["dense"]
