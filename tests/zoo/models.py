"""The zoo: published networks from torchvision and timm, and some of our own for what those do not have.

:data:`ZOO` lists them by name. Weights are random, never downloaded; inputs are as small as the network allows, batch of two. torchvision and
timm are imported when the first of their networks is made, so that this file can be read where they are not installed; see ``tests/zoo/schemas.py``.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.zoo.own import ChannelsLast, Decoder, EncoderClassifier, RecurrentClassifier, TiedLanguageModel, UNet, conv1d

Kind = Literal["cnn", "transformer", "mlp", "rnn"]

#: Names of the layers whose outputs are the hidden units of an MLP, in all networks of the zoo.
MLP_LAYERS = (
    "*mlp*.fc1",
    "*.mlp.0",
    "*.mlp_layer.1",
    "*.mlp.ln1.linear",
    "*.mlp.conv1",
    "*.inverted_conv.conv",
    "*.linear1",
    "*.mlp.gate",
)
#: Names of the layers whose outputs are queries, keys and values.
HEAD_LAYERS = (
    "*.qkv",
    "*.qkv.linear",
    "*.qkv.conv",
    "*.to_qkv",
    "*attn.q",
    "*attn.k",
    "*attn.v",
    "*.q.ln.linear",
    "*.kv",
    "*.kv.linear",
    "*.self_attention",
    "*.self_attn",
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One network of the zoo.

    Attributes:
        kind: What is asked of it: ``"cnn"``, ``"transformer"`` (also those with convolutions), ``"mlp"`` or ``"rnn"``.
        make: Returns a fresh network in float32; draws from torch's global generator.
        shape: Shape of its input, batch of two.
        tokens: Size of the vocabulary; None if the input is of floats.
        flops: Share of its multiply-adds that a random plan shall leave, more than a half where half cannot be reached; None if no channel of
            it can leave at all.
        share: Least share of its multiply-adds in layers that can lose channels, of those that touch no norm over channels; only of CNNs.
        heads: Whether its code lets heads leave; only of transformers.
        exports: Whether the dense network can be written as an ONNX file.
    """

    kind: Kind
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int | None = None
    flops: float | None = 0.5
    share: float = 0.95
    heads: bool = True
    exports: bool = True

    def example(self) -> Tensor:
        """Return an input, floats in float64 or token numbers; draws from torch's global generator."""
        if self.tokens is not None:
            return torch.randint(self.tokens, self.shape)
        return torch.randn(self.shape, dtype=torch.float64)


def randomize_(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Give every statistic and every constant parameter random values, in place: norms, biases, scales of layers, tokens, zeroed heads.

    Freshly constructed networks are too tidy for a test of exactness: a normalization that is the identity, a bias that is zero or a
    residual branch of scale 1e-6 hides what is wrong in it. Statistics that are random altogether hide more: they damp the signal layer
    by layer, until the outputs of EfficientNet-B0 depend on its input by 3e-12 of their size. So they are those of ``inputs``, disturbed.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                if bool(parameter.any()):
                    parameter.uniform_(0.7, 1.3)
                else:
                    parameter.normal_(0, 0.1)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all inputs
        model.train()
        for value in inputs:
            model(value)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            assert norm.running_mean is not None
            assert norm.running_var is not None
            # a channel that barely varies would be blown up, and float32 could not tell 1e-5 any more
            norm.running_var += 0.1 * norm.running_var.mean()
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.9, 1.3)
        model.eval()


def matching(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Return the modules that hold parameters of their own and whose name matches one of ``patterns``."""
    return [
        name
        for name, module in model.named_modules()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        and any(True for _ in module.parameters(recurse=False))
    ]


def _image(size: int) -> tuple[int, ...]:
    return (2, 3, size, size)


def _vision(name: str, kind: Kind, shape: tuple[int, ...] = _image(64), **options: Any) -> Entry:
    def make() -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, weights=None, **{"num_classes": 10, **options})

    return Entry(kind, make, shape)


def _timm(name: str, kind: Kind, size: int = 64, **options: Any) -> Entry:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10, **options)

    return Entry(kind, make, _image(size))


def _small_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, num_layers=4, num_heads=6, hidden_dim=192, mlp_dim=768, num_classes=10)


def _small_maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit(
        (64, 64),
        16,
        partition_size=4,
        block_channels=[32, 64],
        block_layers=[1, 2],
        head_dim=8,
        stochastic_depth_prob=0.1,
        num_classes=10,
    )


def _small_mvit() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    sizes = [(2, 32, 32, 1, 4), (2, 32, 64, 2, 4), (4, 64, 64, 1, 2), (4, 64, 128, 2, 2), (8, 128, 128, 1, 1)]
    blocks = [
        MSBlockConfig(heads, inputs, outputs, [3, 3, 3], [3, 3, 3], [1, stride_q, stride_q], [1, stride_kv, stride_kv])
        for heads, inputs, outputs, stride_q, stride_kv in sizes
    ]
    how = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    return MViT((64, 64), 4, blocks, **how, stochastic_depth_prob=0.1, num_classes=10)


#: The networks by name: those of torchvision and timm under ``library.name``, our own under their name.
ZOO: dict[str, Entry] = {
    **{
        f"torchvision.{name}": _vision(name, "cnn")
        for name in (
            *("resnet18", "resnet50", "resnext50_32x4d", "densenet121", "mobilenet_v2", "mobilenet_v3_small"),
            *("mobilenet_v3_large", "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf"),
            *("regnet_y_400mf", "shufflenet_v2_x1_0", "squeezenet1_1", "alexnet", "convnext_tiny"),
        )
    },
    "torchvision.googlenet": _vision("googlenet", "cnn", init_weights=False),
    # 299: in train mode an auxiliary head needs a map of 17 x 17
    "torchvision.inception_v3": _vision("inception_v3", "cnn", _image(299), init_weights=False),
    "torchvision.deeplabv3_mobilenet_v3_large": _vision(
        "deeplabv3_mobilenet_v3_large", "cnn", weights_backbone=None, aux_loss=True
    ),
    "torchvision.lraspp_mobilenet_v3_large": _vision("lraspp_mobilenet_v3_large", "cnn", weights_backbone=None),
    **{f"torchvision.{name}": _vision(name, "cnn", (2, 3, 4, 32, 32)) for name in ("r3d_18", "mc3_18", "r2plus1d_18")},
    "torchvision.swin_t": replace(_vision("swin_t", "transformer"), flops=0.8, heads=False),
    "torchvision.swin_v2_t": replace(_vision("swin_v2_t", "transformer"), flops=0.8, heads=False),
    "torchvision.vit": Entry("transformer", _small_vit, _image(64)),
    "torchvision.maxvit": Entry("transformer", _small_maxvit, _image(64), heads=False),
    "torchvision.mvit_v2": Entry("transformer", _small_mvit, (2, 3, 4, 64, 64), flops=0.6, heads=False),
    **{
        f"timm.{name}": _timm(name, "cnn")
        for name in (
            *("seresnet18", "res2net50_26w_4s", "resnest14d"),
            *("hrnet_w18_small", "dla34", "cspresnet50", "xception41", "selecsls42b", "ghostnet_100", "regnety_002"),
            *("repvgg_a0", "mixnet_s", "convnext_atto", "poolformer_s12", "inception_next_atto", "tresnet_m"),
        )
    },
    # its blocks split what they are given by a number that they compute, in_channels // num_paths
    "timm.skresnet18": replace(_timm("skresnet18", "cnn"), share=0.9),
    # a convolution over neighbouring channels holds them in their places
    "timm.ecaresnet26t": replace(_timm("ecaresnet26t", "cnn"), share=0.85),
    # weights that are standardized over their inputs change with every input that leaves
    "timm.nf_resnet26": replace(_timm("nf_resnet26", "cnn"), flops=None),
    **{f"timm.{name}": _timm(name, "mlp", 224) for name in ("mixer_s32_224", "resmlp_12_224")},
    **{
        f"timm.{name}": _timm(name, "transformer", img_size=64)
        for name in ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")
    },
    **{
        f"timm.{name}": replace(_timm(name, "transformer", img_size=64), heads=False)
        for name in ("cait_xxs24_224", "coat_lite_tiny")
    },
    "timm.swin_tiny_patch4_window7_224": _timm("swin_tiny_patch4_window7_224", "transformer", 112, img_size=112),
    "timm.mobilevit_xxs": _timm("mobilevit_xxs", "transformer"),
    **{
        f"timm.{name}": replace(_timm(name, "transformer"), heads=False)
        for name in ("edgenext_xx_small", "efficientvit_b0", "pvt_v2_b0")
    },
    # in eval mode its attention keeps a table for the number of heads that it had when it was first called
    "timm.levit_128s": replace(_timm("levit_128s", "transformer", 224), heads=False),
    "timm.visformer_tiny": _timm("visformer_tiny", "transformer", 224),
    "unet": Entry("cnn", UNet, _image(32)),
    "conv1d": Entry("cnn", conv1d, (2, 4, 64)),
    "channels_last": Entry("cnn", ChannelsLast, _image(32)),
    "transformer_encoder": Entry("transformer", EncoderClassifier, (2, 12), tokens=50),
    "grouped_query_attention": Entry("transformer", Decoder, (2, 12), tokens=50),
    "lstm": Entry("rnn", lambda: RecurrentClassifier(nn.LSTM, bidirectional=True), (2, 12), tokens=50),
    "gru": Entry("rnn", lambda: RecurrentClassifier(nn.GRU, bidirectional=False), (2, 12), tokens=50),
    "tied_embedding": Entry("rnn", TiedLanguageModel, (2, 12), tokens=50, exports=False),
}
