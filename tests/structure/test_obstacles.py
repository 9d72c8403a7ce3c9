"""Every reason to leave a layer alone, each on the smallest model that has it."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from lightning_prune.structure.factorized import factorize
from lightning_prune.structure.obstacles import obstacle, obstacles


class Own(nn.Linear):
    pass


class Reads(nn.Module):
    """Reads the weight of one layer in ``forward`` and calls the other."""

    def __init__(self):
        super().__init__()
        self.fc, self.body = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.named = nn.ModuleDict({"inner": nn.Linear(3, 3)})
        self.sound = nn.Linear(3, 3)
        nn.init.zeros_(self.sound.weight)

    def reset_parameters(self):
        nn.init.zeros_(self.sound.bias)

    def forward(self, x):
        return self.sound(nn.functional.linear(x, self.fc.weight)) + self.penalty()

    @torch.no_grad()
    def penalty(self):
        return max((0, 1), key=lambda _: self.named.inner.weight.norm())


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer, self.lora_A = nn.Linear(4, 4), nn.Linear(4, 1)


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 4))


def with_hook(method):
    layer = nn.Linear(3, 4)
    getattr(layer, method)(lambda *args: None)
    return layer


def replaced_forward():
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: x
    return layer


def with_extra(kind):
    layer = nn.Linear(3, 4)
    if kind == "buffer":
        layer.register_buffer("mask", torch.ones(4, 3))
    else:
        layer.lora_A = nn.Parameter(torch.zeros(2, 3))
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=4), "depthwise"),
        (lambda: nn.ConvTranspose2d(3, 4, 3), "transposed"),
        (lambda: nn.LazyConv2d(4, 3), "lazy"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), "parametrized"),
        (lambda: parametrizations.spectral_norm(nn.Conv1d(3, 4, 3)), "parametrized"),
        (lambda: spectral_norm(nn.Linear(3, 4)), "computed by a hook"),
        (old_weight_norm, "computed by a hook"),
        (lambda: prune.random_unstructured(nn.Linear(3, 4), "weight", 0.5), "computed by a hook"),
        (lambda: Own(3, 4), "Own extends Linear"),
        (lambda: nn.Embedding(3, 4), "Embedding is not factorized"),
        (lambda: nn.LSTM(3, 4), "LSTM is not factorized"),
        (lambda: nn.Linear(3, 4, device="meta"), "meta device"),
        (lambda: nn.Linear(3, 4, dtype=torch.complex64), "type complex64"),
        (lambda: with_extra("buffer"), "carries further"),
        (lambda: with_extra("parameter"), "carries further"),
        (lambda: with_hook("register_forward_hook"), "hooks"),
        (lambda: with_hook("register_forward_pre_hook"), "hooks"),
        (lambda: with_hook("register_full_backward_hook"), "hooks"),
        (lambda: with_hook("register_full_backward_pre_hook"), "hooks"),
        (replaced_forward, "forward was replaced"),
    ],
)
def test_layer_that_cannot_be_factorized_says_why(make, reason):
    layer = make()
    assert reason in obstacle(layer)
    assert reason in obstacles(nn.Sequential(layer))["0"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 4, dtype=torch.bfloat16),
        nn.Conv2d(1, 1, 3),
        nn.Conv2d(4, 1, 3),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv3d(2, 4, 3, padding_mode="circular"),
        nn.Conv1d(2, 4, 3, bias=False).requires_grad_(False),
    ],
    ids=str,
)
def test_layer_that_can_be_factorized_has_no_obstacle(layer):
    assert obstacle(layer) is None
    assert obstacles(nn.Sequential(layer)) == {}
    factorize(layer, "linear" if isinstance(layer, nn.Linear) else "channel", 1)


def test_tied_weights_name_all_their_owners():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "free": nn.Linear(3, 5)})
    model["head"].weight = model["embedding"].weight
    found = obstacles(model)
    assert found["head"] == "its parameters are tied: embedding.weight = head.weight"
    assert set(found) == {"embedding", "head"}


def test_tied_biases_count_as_well():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    assert set(obstacles(model)) == {"0", "1"}


def test_module_under_two_names_is_left_alone_and_both_are_named():
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Linear(3, 3))
    model.alias = model.encoder[0]
    model.other = nn.Linear(3, 3)
    assert obstacles(model) == {"encoder.0": "it is used under several names: encoder.0, alias"}


def test_module_called_twice_under_one_name_is_no_obstacle():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer)
    model(model(torch.zeros(1, 3)))
    assert obstacles(model) == {}


def test_projection_of_attention_is_left_alone():
    found = obstacles(nn.Sequential(nn.MultiheadAttention(4, 2)))
    assert set(found) == {"0", "0.out_proj"}
    assert found["0.out_proj"] == "NonDynamicallyQuantizableLinear extends Linear with code of its own"


def test_layers_whose_weight_a_parent_reads_are_left_alone():
    found = obstacles(nn.Sequential(Reads()))
    assert found == {
        "0.fc": "Reads.forward reads its weight instead of calling it",
        "0.named.inner": "Reads.penalty reads its weight instead of calling it",
    }


def test_feed_forward_layers_of_torchs_transformer_are_read_by_its_fast_path():
    found = obstacles(nn.TransformerEncoderLayer(4, 2, 8))
    assert found["linear1"] == "TransformerEncoderLayer.forward reads its weight instead of calling it"
    assert "linear2" in found


def test_layers_in_an_adapter_are_left_alone():
    model = nn.Sequential(Adapter(), nn.Linear(4, 4))
    assert obstacles(model) == dict.fromkeys(
        ("0.base_layer", "0.lora_A"), "it is wrapped by the adapter Adapter: merge the adapter first"
    )


def test_factors_are_not_factorized_again():
    model = nn.Sequential(factorize(nn.Conv2d(4, 6, 3), "channel", 2))
    assert obstacles(model) == dict.fromkeys(("0.first", "0.second"), "it is a factor already")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # torch's own, when it makes the layer
def test_quantized_layers_are_named():
    quantized = torch.ao.nn.quantized.Linear(3, 4)
    assert obstacle(quantized) == "Linear is quantized"
    assert "0" in obstacles(nn.Sequential(quantized))


def test_weights_that_are_no_plain_tensors_are_named():
    class Sharded(nn.Parameter):
        pass

    layer = nn.Linear(3, 4)
    layer.weight = Sharded(torch.zeros(4, 3))
    assert obstacle(layer) == "its weight is a Sharded, not a plain tensor (sharded, quantized)"
