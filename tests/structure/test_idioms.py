"""What people write in ``forward``, one rule each: as many units as can leave, exactly.

Each row is a network of one expression and the number of its units. A number below that of the channels is as much a claim as one above
zero: what a rule lets leave too much shows as an error or as a difference.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.structure.units import Net, cut_at_random, structure_of

IMAGE, TOKENS, WORDS = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 5), torch.arange(8).view(2, 4)


def c(inputs, outputs, kernel=1, **options):
    return nn.Conv2d(inputs, outputs, kernel, **options)


def n(inputs, outputs, **options):
    return nn.Linear(inputs, outputs, **options)


def p(*sizes):
    return nn.Parameter(torch.rand(sizes) + 0.5)


def written(y, places, values):
    """Return a copy of ``y`` with ``values`` at ``places``."""
    y = y.clone()
    y[places] = values
    return y


def added_in_place(y, part):
    y = y.clone()
    y[:, :4] += part
    return y


def added_without_gradient(y):
    y = y.detach()
    with torch.no_grad():
        y.chunk(2, 1)[0].add_(1.0)
    return y


def chained(y):
    y = y.clone()
    y.relu_().sigmoid_()
    return y


def filled(x):
    y = torch.zeros(2, 6, 6, 6, dtype=x.dtype)
    y[:, :3] = 1.5
    return y


def by_hand(weight):
    return weight / weight.flatten(1).norm(dim=1)[:, None, None, None]


def windows(y):
    return F.fold(F.unfold(y, 3), (6, 6), 3)


def heads(y, number, wide):
    return y.view(2, 4, number, -1, wide).permute(2, 0, 3, 1, 4)


WEIGHTS = {  # computed from parameters: what is held at zero, and is that enough?
    "sum of two weights": (
        lambda s, x: s.o(F.conv2d(x, s.w + s.d)),
        IMAGE,
        6,
        {"w": p(6, 3, 1, 1), "d": p(6, 1, 1, 1), "o": c(6, 2)},
    ),
    "sum the other way round": (
        lambda s, x: s.o(F.conv2d(x, s.d + s.w)),
        IMAGE,
        6,
        {"w": p(6, 3, 1, 1), "d": p(6, 1, 1, 1), "o": c(6, 2)},
    ),
    "weight norm by hand": (
        lambda s, x: s.o(F.conv2d(x, by_hand(s.w) * s.g)),
        IMAGE,
        6,
        {"w": p(6, 3, 1, 1), "g": p(6, 1, 1, 1), "o": c(6, 2)},
    ),
    "low-rank addition": (
        lambda s, x: s.o(F.linear(x, s.f.weight + s.b @ s.a).relu()),
        TOKENS,
        10,
        {"f": n(5, 6), "a": p(4, 5), "b": p(6, 4), "o": n(6, 2)},
    ),
    "concatenated weights": (
        lambda s, x: s.o(F.linear(x, torch.cat([s.q, s.k]))),
        TOKENS,
        10,
        {"q": p(4, 5), "k": p(6, 5), "o": n(10, 2)},
    ),
    "bias with a zero part": (
        lambda s, x: s.o(F.linear(x, s.w, torch.cat([s.q, torch.zeros_like(s.v), s.v])).chunk(3, -1)[2]),
        TOKENS,
        8,  # the zeros shrink with v, the middle third with the last
        {"w": p(12, 5), "q": p(4), "v": p(4), "o": n(4, 2)},
    ),
    "bias of two functions": (
        lambda s, x: s.o(s.a(x) + s.b.abs() + s.b.exp()),
        TOKENS,
        8,
        {"a": n(5, 8, bias=False), "b": p(8), "o": n(8, 2)},
    ),
    "matrix from a vector": (
        lambda s, x: s.o(F.linear(s.a(x), s.w.view(6, -1))),
        TOKENS,
        0,
        {"a": n(5, 4), "w": p(24), "o": n(6, 2)},
    ),
    "kernel from a vector": (
        lambda s, x: s.o(F.conv2d(s.a(x), s.w.view(6, -1, 1, 1))),
        IMAGE,
        0,
        {"a": c(3, 4), "w": p(24), "o": c(6, 2)},
    ),
    "kernel chosen by the input": (
        lambda s, x: s.o(
            F.conv2d(s.a(x), torch.einsum("k,koi->oi", s.r(s.a(x).mean((0, 2, 3))).softmax(0), s.w)[..., None, None])
        ),
        IMAGE,
        10,
        {"a": c(3, 4), "r": n(4, 3), "w": p(3, 6, 4), "o": c(6, 2)},
    ),
    "norm with 1 + scale": (
        lambda s, x: s.o(F.batch_norm(s.a(x), s.m.detach(), s.m.detach() ** 2, 1 + s.g, s.b)),
        IMAGE,
        0,
        {"a": c(3, 6), "g": p(6), "b": p(6), "m": p(6), "o": c(6, 2)},
    ),
    "group norm with a shifted bias": (
        lambda s, x: s.o(F.group_norm(s.a(x), s.k, s.g, s.b + 1)),
        IMAGE,
        3,
        {"k": 3, "a": c(3, 6), "g": p(6), "b": p(6), "o": c(6, 2)},
    ),
    "weight norm over everything": (
        lambda s, x: s.o(s.a(x)),
        TOKENS,
        0,
        {"a": nn.utils.parametrizations.weight_norm(n(5, 6), dim=None), "o": n(6, 2)},
    ),
    "spectral norm": (
        lambda s, x: s.o(s.a(x)),
        TOKENS,
        0,
        {"a": nn.utils.parametrizations.spectral_norm(n(5, 6)), "o": n(6, 2)},
    ),
    "addmm": (
        lambda s, x: s.o(torch.addmm(s.b, s.a(x).flatten(0, 1), s.w)),
        TOKENS,
        12,
        {"a": n(5, 6), "w": p(6, 6), "b": p(6), "o": n(6, 2)},
    ),
    "addmm behind a constant": (
        lambda s, x: s.o(torch.addmm(s.b, s.a(x).sigmoid().flatten(0, 1), s.w)),
        TOKENS,
        6,
        {"a": n(5, 6), "w": p(6, 6), "b": p(6), "o": n(6, 2)},
    ),
    "a parameter of one element": (lambda s, x: s.o(s.a(x) * s.g), TOKENS, 8, {"a": n(5, 8), "g": p(1), "o": n(8, 2)}),
    "a shift of one element": (lambda s, x: s.o(s.a(x) + s.g), TOKENS, 0, {"a": n(5, 8), "g": p(1), "o": n(8, 2)}),
}
MEMORY = {  # written in place
    "a copy in place through a chain": (lambda s, x: s.o(chained(s.a(x))), IMAGE, 8, {"a": c(3, 8), "o": c(8, 2)}),
    "a slice is added to": (
        lambda s, x: s.o(added_in_place(s.a(x), s.b(x))),
        IMAGE,
        0,
        {"a": c(3, 8), "b": c(3, 4), "o": c(8, 2)},
    ),
    "half of a chunk, without gradient": (
        lambda s, x: s.o(added_without_gradient(s.a(x))),
        IMAGE,
        0,
        {"a": c(3, 8), "o": c(8, 2)},
    ),
    "an index": (
        lambda s, x: s.o(written(s.a(x), (slice(None), torch.tensor([0, 2])), 0.0)),
        IMAGE,
        0,
        {"a": c(3, 8), "o": c(8, 2)},
    ),
    "zeros that are partly filled": (
        lambda s, x: s.o(F.relu(s.a(x) + filled(x))),
        IMAGE,
        0,
        {"a": c(3, 6), "o": c(6, 2)},
    ),
}
ELEMENTS = {
    "the larger of two": (
        lambda s, x: s.o(torch.max(s.a(x), s.b(x))),
        TOKENS,
        6,
        {"a": n(5, 6), "b": n(5, 6), "o": n(6, 2)},
    ),
    "the larger of a constant": (
        lambda s, x: s.o(torch.max(torch.ones(6, dtype=x.dtype), s.a(x))),
        TOKENS,
        0,
        {"a": n(5, 6), "o": n(6, 2)},
    ),
    "where with channels in the condition": (
        lambda s, x: s.o(torch.where(s.a(x) > 0, s.a(x), s.b(x).exp())),
        IMAGE,
        0,
        {"a": c(3, 6), "b": c(3, 6), "o": c(6, 2)},
    ),
    "infinite when masked": (
        lambda s, x: s.o(s.a(x).abs() * s.a(x).abs().log()),
        IMAGE,
        0,
        {"a": c(3, 6), "o": c(6, 2)},
    ),
    "cast to integers": (
        lambda s, x: s.o((s.a(x).sigmoid() + 0.3).long() + s.a(x).sigmoid()),
        IMAGE,
        0,
        {"a": c(3, 4), "o": c(4, 2)},
    ),
    "expanded to another's shape": (
        lambda s, x: s.o(s.a(x) * s.g(x).expand_as(s.a(x))),
        IMAGE,
        6,
        {"a": c(3, 6), "g": c(3, 1), "o": c(6, 2)},
    ),
    "expanded, then summed over": (
        lambda s, x: s.o(s.a(x)) + s.q(s.g(x).expand_as(s.a(x))),
        IMAGE,
        0,
        {"a": c(3, 6), "g": c(3, 1), "o": c(6, 2), "q": c(6, 2)},
    ),
    "viewed as another": (
        lambda s, x: s.o(s.w.view_as(s.a(x))) + s.o(s.a(x)),
        TOKENS,
        0,
        {"a": n(5, 6), "w": p(48), "o": n(6, 2)},
    ),
    "slopes per channel and one for all": (
        lambda s, x: s.o(s.r(s.q(s.a(x)))),
        IMAGE,
        6,
        {"a": c(3, 6), "q": nn.PReLU(6), "r": nn.PReLU(), "o": c(6, 2)},
    ),
    "normalized to length 1": (lambda s, x: s.o(F.normalize(s.a(x), dim=1)), IMAGE, 4, {"a": c(3, 4), "o": c(4, 2)}),
    "outer product": (
        lambda s, x: s.o((s.a(x)[..., :, None] * s.b(x)[..., None, :]).flatten(2)),
        TOKENS,
        4,
        {"a": n(5, 3), "b": n(5, 4), "o": n(12, 2)},
    ),
    "outer product with itself": (
        lambda s, x: s.o((s.a(x)[..., :, None] * s.a(x)[..., None, :]).flatten(2)),
        TOKENS,
        0,
        {"a": n(5, 3), "o": n(9, 2)},
    ),
}
REDUCTIONS = {
    "indices of a maximum": (
        lambda s, x: s.o(sum(F.max_pool2d(s.a(x).relu(), 2, return_indices=True))),
        IMAGE,
        0,
        {"a": c(3, 4), "o": c(4, 2)},
    ),
    "values and indices along places": (
        lambda s, x: s.o(s.a(x).flatten(2).max(2).values),
        IMAGE,
        4,
        {"a": c(3, 4), "o": n(4, 2)},
    ),
    "average of constants with another divisor": (
        lambda s, x: s.o(F.avg_pool2d(s.a(x).sigmoid(), 2, divisor_override=3)),
        IMAGE,
        0,
        {"a": c(3, 4), "o": c(4, 2)},
    ),
    "average of constants": (
        lambda s, x: s.o(F.avg_pool2d(s.a(x).sigmoid(), 2)),
        IMAGE,
        4,
        {"a": c(3, 4), "o": c(4, 2)},
    ),
    "average of padded constants": (
        lambda s, x: s.o(F.avg_pool2d(s.a(x).sigmoid(), 2, padding=1)),
        IMAGE,
        0,
        {"a": c(3, 4), "o": c(4, 2)},
    ),
    "sum over the channels": (lambda s, x: s.o(s.a(x).sum(1, keepdim=True)), IMAGE, 4, {"a": c(3, 4), "o": c(1, 2)}),
    "mean over the channels": (lambda s, x: s.o(s.a(x).mean(1, keepdim=True)), IMAGE, 0, {"a": c(3, 4), "o": c(1, 2)}),
    "smallest entry as a norm": (
        lambda s, x: s.o(s.a(x)) + torch.linalg.vector_norm(s.a(x), ord=-float("inf"), dim=1, keepdim=True),
        IMAGE,
        0,
        {"a": c(3, 4), "o": c(4, 2)},
    ),
    "running sum of exponentials along tokens": (
        lambda s, x: s.o(s.a(x).logcumsumexp(1)),
        TOKENS,
        0,
        {"a": n(5, 6), "o": n(6, 2)},
    ),
    "running sum along tokens": (lambda s, x: s.o(s.a(x).cumsum(1)), TOKENS, 6, {"a": n(5, 6), "o": n(6, 2)}),
    "the best channels": (lambda s, x: s.o(s.a(x).topk(2, 1).values), IMAGE, 0, {"a": c(3, 6), "o": c(2, 2)}),
    "norms in every form": (
        lambda s, x: s.o(s.j(s.i(s.g(s.a(x))))),
        IMAGE,
        4,
        {
            "a": c(3, 8),
            "g": nn.GroupNorm(4, 8, affine=False),
            "i": nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            "j": nn.InstanceNorm2d(8),
            "o": c(8, 2),
        },
    ),
}
PLACES = {
    "one channel by number": (lambda s, x: s.o(s.a(x)) + s.a(x)[..., 3:4], TOKENS, 0, {"a": n(5, 6), "o": n(6, 2)}),
    "one channel, its axis gone": (
        lambda s, x: s.o(s.a(x)) + s.a(x)[..., 3, None],
        TOKENS,
        2,
        {"a": n(5, 6), "o": n(6, 2)},
    ),  # those behind it
    "one channel from the end": (
        lambda s, x: s.o(s.a(x)) + s.a(x)[..., -3, None],
        TOKENS,
        3,
        {"a": n(5, 6), "o": n(6, 2)},
    ),  # those before it
    "a row of a view": (
        lambda s, x: s.o(s.a(x).view(2, 4, -1, 4)[:, :, 2]) + s.a(x).sum(),
        TOKENS,
        0,
        {"a": n(5, 12), "o": n(4, 2)},
    ),
    "rows of a view apart": (
        lambda s, x: s.o(sum(s.a(x).view(2, 4, -1, 4).unbind(2))),
        TOKENS,
        0,
        {"a": n(5, 12), "o": n(4, 2)},
    ),
    "channels in another order": (
        lambda s, x: s.o(s.a(x)[..., torch.randperm(8)]),
        TOKENS,
        0,
        {"a": n(5, 8), "o": n(8, 2)},
    ),
    "channels backwards": (lambda s, x: s.o(s.a(x).flip(-1)), TOKENS, 8, {"a": n(5, 8), "o": n(8, 2)}),
    "channels repeated": (lambda s, x: s.o(s.a(x).repeat(1, 1, 3)), TOKENS, 4, {"a": n(5, 4), "o": n(12, 2)}),
    "channels rolled": (lambda s, x: s.o(s.a(x).roll(1, -1)), TOKENS, 0, {"a": n(5, 8), "o": n(8, 2)}),
    "places rolled": (lambda s, x: s.o(s.a(x).roll(1, 1)), TOKENS, 8, {"a": n(5, 8), "o": n(8, 2)}),
    "squeeze without an axis": (
        lambda s, x: s.o(s.a(x).mean((2, 3), keepdim=True).squeeze()),
        IMAGE,
        1,
        {"a": c(3, 3), "o": n(3, 2)},
    ),  # two stay
    "windows": (lambda s, x: s.o(windows(s.a(x))), IMAGE, 0, {"a": c(3, 4), "o": c(4, 2)}),
    "space to channels": (lambda s, x: s.o(F.pixel_unshuffle(s.a(x), 2)), IMAGE, 4, {"a": c(3, 4), "o": c(16, 2)}),
    "constants beside each other": (
        lambda s, x: s.o(torch.cat([s.a(x).sigmoid(), s.b(x)], 1)),
        IMAGE,
        6,
        {"a": c(3, 6), "b": c(3, 6), "o": c(12, 2)},
    ),
    "constants above each other": (
        lambda s, x: s.o(torch.cat([s.a(x).sigmoid(), s.b(x)], 2)),
        IMAGE,
        0,
        {"a": c(3, 6), "b": c(3, 6), "o": c(6, 2)},
    ),
    "padding around": (
        lambda s, x: s.o(s.a(x).sigmoid()),
        IMAGE,
        4,
        {"a": c(3, 4), "o": c(4, 2, 3, padding=1, padding_mode="circular")},
    ),
    "groups of a shuffle": (
        lambda s, x: s.o(s.m(s.a(x))),
        IMAGE,
        3,
        {"a": c(3, 6), "m": nn.ChannelShuffle(3), "o": c(6, 2)},
    ),
    "channels to space": (lambda s, x: s.o(F.pixel_shuffle(s.a(x), 2)), IMAGE, 2, {"a": c(3, 8), "o": c(2, 2)}),
    "all channels to space": (lambda s, x: s.o(F.pixel_shuffle(s.a(x), 2)), IMAGE, 0, {"a": c(3, 4), "o": c(1, 2)}),
    "cut at places": (
        lambda s, x: s.o(sum(s.a(x).tensor_split([2, 4], -1))),
        TOKENS,
        0,
        {"a": n(5, 6), "o": n(2, 2)},
    ),
    "a gate of one channel": (lambda s, x: s.o(F.glu(s.a(x))), TOKENS, 0, {"a": n(5, 2), "o": n(1, 2)}),
}
PRODUCTS = {
    "a matrix for all of a batch": (
        lambda s, x: s.o((s.a(x)[:, None] @ s.w)[:, 0]),
        TOKENS,
        10,
        {"a": n(5, 4), "w": p(1, 4, 6), "o": n(6, 2)},
    ),
    "similarity with itself": (lambda s, x: s.a(x) @ s.a(x).mT, TOKENS, 4, {"a": n(5, 4)}),
    "channels with channels": (lambda s, x: s.o(s.a(x).mT @ s.a(x)), TOKENS, 0, {"a": n(5, 4), "o": n(4, 2)}),
    "repeated letters": (
        lambda s, x: s.o(torch.einsum("bcc->bc", s.a(x).mT @ s.a(x))),
        TOKENS,
        0,
        {"a": n(5, 4), "o": n(4, 2)},
    ),
    "one head whose values are as wide as they like": (
        lambda s, x: s.o(F.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x))),
        TOKENS,
        6,
        {"q": n(5, 4), "k": n(5, 4), "v": n(5, 6), "o": n(6, 2)},
    ),
    "heads that share values, which get narrower": (
        lambda s, x: s.o(
            F.scaled_dot_product_attention(*heads(s.q(x), 2, 4), s.v(x)[:, None].expand(-1, 2, -1, -1))
            .transpose(1, 2)
            .flatten(2)
        ),
        TOKENS,
        6,
        {"q": n(5, 16), "v": n(5, 6), "o": n(12, 2)},
    ),
    "a mask per head": (
        lambda s, x: s.o(
            F.scaled_dot_product_attention(*heads(s.q(x), 3, 4), s.m.expand(-1, 4, 4)).transpose(1, 2).flatten(2)
        ),
        TOKENS,
        2,
        {"q": n(5, 24), "m": p(2, 1, 1), "o": n(8, 2)},
    ),
    "grouped queries by torch": (
        lambda s, x: s.o(
            F.scaled_dot_product_attention(heads(s.q(x), 1, 2)[0], *heads(s.k(x), 2, 2), enable_gqa=True)
            .transpose(1, 2)
            .flatten(2)
        ),
        TOKENS,
        2,
        {"q": n(5, 8), "k": n(5, 8), "o": n(8, 2)},
    ),
    "weights of attention as an output": (
        lambda s, x: s.m(x, x, x, average_attn_weights=False),
        torch.randn(2, 4, 6),
        0,
        {"m": nn.MultiheadAttention(6, 3, batch_first=True)},
    ),
    "keys and values of torch's attention beside those of the input": (
        lambda s, x: s.m(x, x, x)[0],
        torch.randn(2, 4, 6),
        3,
        {"m": nn.MultiheadAttention(6, 3, batch_first=True, add_bias_kv=True, add_zero_attn=True)},
    ),
    "positions from a buffer": (
        lambda s, x: s.o(s.e(x) + s.q(s.i.to(x.device)[:, :4])),
        WORDS,
        6,
        {"e": nn.Embedding(9, 6), "q": nn.Embedding(8, 6), "i": nn.Buffer(torch.arange(8)[None]), "o": n(6, 2)},
    ),
    "a bag of words": (lambda s, x: s.o(s.e(x)), WORDS, 0, {"e": nn.EmbeddingBag(9, 6), "o": n(6, 2)}),
    "groups that are transposed": (
        lambda s, x: s.o(s.t(s.a(x))),
        IMAGE,
        0,
        {"a": c(3, 4), "t": nn.ConvTranspose2d(4, 8, 2, groups=2), "o": c(8, 2)},
    ),
}
LAYERS = {
    "both directions of the last layer": (
        lambda s, x: s.o(torch.cat(s.r(x)[1][0][-2:].unbind(0), 1)),
        TOKENS,
        4,
        {"r": nn.LSTM(5, 4, 2, bidirectional=True, batch_first=True), "o": n(8, 2)},
    ),
    "the last layer alone": (
        lambda s, x: s.o(s.r(x)[1][-1]),
        TOKENS,
        8,
        {"r": nn.GRU(5, 4, 2, batch_first=True), "o": n(4, 2)},
    ),
    "states of all layers in a row": (
        lambda s, x: s.o(s.r(x)[1].transpose(0, 1).reshape(2, -1)),
        TOKENS,
        4,
        {"r": nn.GRU(5, 4, 2, batch_first=True), "o": n(8, 2)},
    ),
    "a first state of its own": (
        lambda s, x: s.o(s.r(x, s.h)[0]),
        TOKENS,
        0,
        {"r": nn.GRU(5, 4, batch_first=True), "h": p(1, 2, 4), "o": n(4, 2)},
    ),
    "a scale in buffers": (
        lambda s, x: s.o(s.a(x) * s.t * s.u),
        TOKENS,
        4,
        {"a": n(5, 4), "t": nn.Buffer(torch.rand(4)), "u": nn.Buffer(torch.rand(4), persistent=False), "o": n(4, 2)},
    ),
    "a shift in a buffer": (
        lambda s, x: s.o(s.a(x) + s.t),
        TOKENS,
        0,
        {"a": n(5, 4), "t": nn.Buffer(torch.rand(4)), "o": n(4, 2)},
    ),
    "a tensor that is no buffer": (
        lambda s, x: s.o(s.a(x) * s.t),
        TOKENS,
        0,
        {"a": n(5, 4), "t": torch.rand(4, dtype=torch.float64), "o": n(4, 2)},
    ),
    "one feature between": (lambda s, x: s.o(s.b(s.a(x))), TOKENS, 6, {"a": n(5, 1), "b": n(1, 6), "o": n(6, 2)}),
}
IDIOMS = WEIGHTS | MEMORY | ELEMENTS | REDUCTIONS | PLACES | PRODUCTS | LAYERS


@pytest.mark.parametrize("name", IDIOMS)
def test_idiom(name):
    forward, inputs, count, members = IDIOMS[name]
    model = Net(forward, **members)
    structure = structure_of(model, inputs)
    assert structure.count == count
    cut_at_random(model, structure, inputs)


def test_a_bias_of_two_weights_takes_up_nothing():
    model = Net(lambda s, x: s.c(s.b(s.a(x).sigmoid()).relu()), a=n(5, 6), b=n(6, 5), c=n(5, 5))
    model.c.bias = model.b.bias
    structure = structure_of(model, TOKENS)
    assert "has no bias of its own" in structure.reasons["a.weight", 0]
    cut_at_random(model, structure, TOKENS)


class FromATable(nn.Module):
    """A hidden layer reads a buffer, as networks do that learn a bias from the distances between positions."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(5, 3))
        self.hidden, self.out, self.data = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(2, 4)

    def forward(self, x):
        return self.data(x) * self.out(F.relu(self.hidden(self.table))).sum(0)


def test_columns_of_a_buffer_stay_and_hidden_units_that_read_it_leave():
    structure = structure_of(FromATable(), torch.randn(2, 2))
    units = {(slot.tensor, slot.axis): slot.units for slot in structure.slots}
    assert (units["hidden.weight", 1] < 0).all()
    assert "buffer" in structure.reasons["hidden.weight", 1]
    assert (units["hidden.weight", 0] >= 0).all()
