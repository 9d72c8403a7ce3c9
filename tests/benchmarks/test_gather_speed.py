"""What gathering is worth: a residual convolution beside one that reads fewer channels of its stream; run with ``-m benchmark -s``.

The rule of :func:`lightning_prune.structure.gathering.gather_pays` stands on this. Both networks run in one process, in turn, on onnxruntime's CPU
provider and in torch. The stream comes from a 1x1 convolution, so that it lies in memory as in the middle of a network.
"""

import pytest
import torch
from lightning_prune.export import export_onnx
from lightning_prune.export.latency import time_round
from lightning_prune.export.runtime import open_session
from torch import nn

from lightning_prune.structure.gathering import gather_pays, gather_steps
from lightning_prune.structure.plan import Plan
from lightning_prune.structure.surgery import compact

SHARES = (0.75, 0.5, 0.25)


class Residual(nn.Module):
    def __init__(self, channels, kernel):
        super().__init__()
        self.stem = nn.Conv2d(channels, channels, 1)
        self.reader = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x):
        x = self.stem(x).relu()
        return x + self.reader(x)


@pytest.mark.benchmark
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [32, 64, 128, 256])
@pytest.mark.parametrize(("batch", "size"), [(1, 8), (1, 16), (1, 32), (16, 16)])
@pytest.mark.filterwarnings("ignore")
def test_speed_over_the_share_of_channels_read(channels, kernel, batch, size, tmp_path):
    dense, x = Residual(channels, kernel).eval(), torch.randn(batch, channels, size, size)
    models = {1.0: dense}
    for share in SHARES:
        kept = torch.randperm(channels) < share * channels
        models[share] = compact(dense, Plan(gather_steps(dense, {"reader": kept})))
    found = {"onnxruntime": {}, "torch": {}}
    for share, model in models.items():
        export_onnx(model, tmp_path / f"{share}.onnx", example_inputs=x)
        session = open_session(tmp_path / f"{share}.onnx", "cpu")
        found["onnxruntime"][share] = session.bind({session.inputs[0].name: x.numpy()})
        found["torch"][share] = torch.inference_mode()(lambda model=model: model(x))
    for engine, runs in found.items():
        least = {share: times.min() for share, times in time_round(runs, warmup=5, runs=60).items()}
        row = "  ".join(f"{share:.0%}: {least[1.0] / least[share]:.2f}" for share in SHARES)
        print(f"\n{engine:11} {kernel}x{kernel}, {channels} channels, {batch}x{size}x{size}: {row}", end="")
        for share in SHARES:
            if gather_pays(dense.reader, int(share * channels)):
                assert least[share] < 1.1 * least[1.0]
