"""Which slices of which tensors leave together: every unit of small networks, written down by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.structure.calls import Call
from lightning_prune.structure.groups import find_units
from tests.structure.units import Net, at, by_number, cut_at_random, layer, structure_of, tied, units

IMAGE, TOKENS = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 3)


def conv(inputs, outputs, kernel=1, **options):
    return nn.Conv2d(inputs, outputs, kernel, **options)


def check(model, expected, *inputs):
    """Assert that the units are ``expected``, sets of slices, and that random ones leave exactly."""
    structure = structure_of(model, *inputs)
    assert units(structure) == set(map(frozenset, expected))
    cut_at_random(model, structure, *inputs)
    return structure


def test_what_is_added_leaves_together():
    model = Net(lambda s, x: s.c(s.a(x) + s.b(x)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2))
    check(model, [layer("a", i) | layer("b", i) | at("c.weight", 1, i) for i in range(4)], IMAGE)


def test_what_is_concatenated_leaves_at_its_place():
    model = Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=conv(3, 2), b=conv(3, 3), c=conv(5, 2))
    first = [layer("a", i) | at("c.weight", 1, i) for i in range(2)]
    check(model, first + [layer("b", i) | at("c.weight", 1, 2 + i) for i in range(3)], IMAGE)


def test_a_channel_leaves_with_all_its_places_after_flatten():
    model = nn.Sequential(conv(3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    check(model, [layer("0", i) | at("3.weight", 1, *range(16 * i, 16 * i + 16)) for i in range(2)], IMAGE)


def test_normalization_leaves_with_the_channel_buffers_included():
    model = nn.Sequential(conv(3, 4, bias=False), nn.BatchNorm2d(4), nn.PReLU(4), conv(4, 2))
    norm = ("weight", "bias", "running_mean", "running_var")
    expected = [
        layer("0", i, bias=False).union(*(at(f"1.{name}", 0, i) for name in norm))
        | at("2.weight", 0, i)
        | at("3.weight", 1, i)
        for i in range(4)
    ]
    assert check(model, expected, IMAGE).shapes["1.num_batches_tracked"] == ()


def test_groups_of_a_convolution_leave_as_a_whole():
    model = nn.Sequential(conv(3, 4), conv(4, 6, groups=2), conv(6, 2))
    expected = [
        layer("0", 2 * g, 2 * g + 1)
        | layer("1", *range(3 * g, 3 * g + 3))
        | at("2.weight", 1, *range(3 * g, 3 * g + 3))
        for g in (0, 1)
    ]
    check(model, expected, IMAGE)


def test_groups_get_thinner_where_none_can_leave_each_by_as_many_inputs():
    model = nn.Sequential(conv(3, 4), conv(4, 6, groups=2))
    unit = [
        layer("0", i) | {("1.weight", row, i % 2) for row in range(3 * (i // 2), 3 * (i // 2) + 3)} for i in range(4)
    ]
    structure = check(model, unit, IMAGE)
    assert tied(structure) == [[{*map(frozenset, unit[:2])}, {*map(frozenset, unit[2:])}]]


def test_thinned_groups_behind_a_shuffle_lose_what_the_shuffle_lets_leave():
    model = nn.Sequential(conv(3, 6), nn.ChannelShuffle(2), conv(6, 2, groups=2))
    structure = structure_of(model, IMAGE)
    # 0 1 2 | 3 4 5 becomes 0 3 1 | 4 2 5, and the shuffle needs pairs (0, 3), (1, 4), (2, 5) to leave
    expected = [
        layer("0", 0, 3) | {("2.weight", 0, 0), ("2.weight", 0, 1)},
        layer("0", 1, 4) | {("2.weight", 0, 2), ("2.weight", 1, 0)},
        layer("0", 2, 5) | {("2.weight", 1, 1), ("2.weight", 1, 2)},
    ]
    assert by_number(structure) == list(map(frozenset, expected))
    assert [[block.tolist() for block in tie] for tie in structure.ties] == [[[0, 0, 1], [1, 2, 2]]]
    cut_at_random(model, structure, IMAGE)


def test_depthwise_filters_leave_with_their_channel():
    model = nn.Sequential(conv(3, 3), conv(3, 6, 3, padding=1, groups=3), conv(6, 2))
    check(
        model,
        [layer("0", g) | layer("1", 2 * g, 2 * g + 1) | at("2.weight", 1, 2 * g, 2 * g + 1) for g in range(3)],
        IMAGE,
    )


def test_halves_of_a_chunk_lose_equally_many():
    def forward(s, x):
        one, two = s.a(x).chunk(2, -1)
        return s.b(one) + s.c(two)

    model = Net(forward, a=nn.Linear(3, 6), b=nn.Linear(3, 2), c=nn.Linear(3, 2))
    expected = [layer("a", i) | at(f"{'bc'[i // 3]}.weight", 1, i % 3) for i in range(6)]
    structure = check(model, expected, TOKENS)
    assert tied(structure) == [[{*map(frozenset, expected[:3])}, {*map(frozenset, expected[3:])}]]


def test_gated_halves_leave_in_pairs():
    model = nn.Sequential(nn.Linear(3, 6), nn.GLU(), nn.Linear(3, 2))
    check(model, [layer("0", i, 3 + i) | at("2.weight", 1, i) for i in range(3)], TOKENS)


def test_squeeze_and_excitation():
    def forward(s, x):
        x = s.a(x)
        return s.c(x * torch.sigmoid(s.fc2(F.relu(s.fc1(x.mean((2, 3))))))[:, :, None, None])

    model = Net(forward, a=conv(3, 4), fc1=nn.Linear(4, 2), fc2=nn.Linear(2, 4), c=conv(4, 2))
    channels = [layer("a", i) | at("fc1.weight", 1, i) | layer("fc2", i) | at("c.weight", 1, i) for i in range(4)]
    check(model, channels + [layer("fc1", i) | at("fc2.weight", 1, i) for i in range(2)], IMAGE)


def test_groups_of_a_group_norm_leave_as_a_whole():
    model = nn.Sequential(conv(3, 6), nn.GroupNorm(3, 6), conv(6, 2))
    check(
        model,
        [
            layer("0", 2 * g, 2 * g + 1) | layer("1", 2 * g, 2 * g + 1) | at("2.weight", 1, 2 * g, 2 * g + 1)
            for g in range(3)
        ],
        IMAGE,
    )


@pytest.mark.parametrize(("cell", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_hidden_unit_leaves_with_its_gates_and_every_layer_loses_as_many(cell, gates):
    rnn = getattr(nn, cell)(3, 2, num_layers=2, bidirectional=True, batch_first=True)
    model = Net(lambda s, x: s.head(s.rnn(x)[0]), rnn=rnn, head=nn.Linear(4, 2))
    expected = []
    for number in range(2):
        for place, suffix in enumerate(("", "_reverse")):
            for k in range(2):
                end, rows = f"l{number}{suffix}", [2 * gate + k for gate in range(gates)]
                unit = set().union(
                    *(at(f"rnn.{name}_{end}", 0, *rows) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
                )
                unit |= at(f"rnn.weight_hh_{end}", 1, k)
                after = ["rnn.weight_ih_l1", "rnn.weight_ih_l1_reverse"] if number == 0 else ["head.weight"]
                expected.append(unit.union(*(at(name, 1, 2 * place + k) for name in after)))
    structure = check(model, expected, TOKENS)
    assert tied(structure) == [[{*map(frozenset, expected[i : i + 2])} for i in (0, 2, 4, 6)]]


def attend(s, x):
    q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in (s.q(x), s.k(x), s.v(x)))
    repeats = q.shape[1] // k.shape[1]
    y = F.scaled_dot_product_attention(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))
    return s.out(y.transpose(1, 2).flatten(2))


def test_a_head_leaves_with_its_query_key_value_and_output():
    model = Net(attend, **{name: nn.Linear(3, 6) for name in "qkv"}, out=nn.Linear(6, 3))
    rows = [(2 * h, 2 * h + 1) for h in range(3)]
    check(model, [layer("q", *r) | layer("k", *r) | layer("v", *r) | at("out.weight", 1, *r) for r in rows], TOKENS)


def test_heads_that_share_a_key_leave_as_a_group():
    model = Net(attend, q=nn.Linear(3, 8), k=nn.Linear(3, 4), v=nn.Linear(3, 4), out=nn.Linear(8, 3))
    expected = []
    for g in range(2):
        q, k = range(4 * g, 4 * g + 4), range(2 * g, 2 * g + 2)
        expected.append(layer("q", *q) | layer("k", *k) | layer("v", *k) | at("out.weight", 1, *q))
    check(model, expected, TOKENS)


def test_heads_of_torchs_own_attention():
    model = Net(
        lambda s, x: s.mha(s.enter(x), x, x)[0],
        enter=nn.Linear(3, 4),
        mha=nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True),
    )
    heads = []
    for rows in ((0, 1), (2, 3)):
        unit = set().union(*(at(f"mha.{name}_proj_weight", 0, *rows) for name in "qkv"))
        unit |= at("mha.in_proj_bias", 0, *(4 * block + row for block in range(3) for row in rows))
        heads.append(unit | at("mha.out_proj.weight", 1, *rows))
    check(model, heads + [layer("enter", i) | at("mha.q_proj_weight", 1, i) for i in range(4)], TOKENS)


def test_columns_of_an_embedding_tied_to_the_output_leave_its_words_stay():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    structure = structure_of(model, torch.arange(6).view(2, 3))
    expected = [at("0.weight", 1, i) | at("1.weight", 1, i) | layer("1", i) for i in range(4)]
    assert units(structure) == set(map(frozenset, expected))  # the columns are one tensor: read and written
    assert structure.reasons["0.weight", 0].startswith("it is an entry of a table that is looked up")
    cut_at_random(model, structure, torch.arange(6).view(2, 3))


def test_a_layer_scale_is_a_bare_parameter():
    model = Net(
        lambda s, x: s.c(s.a(x) + s.gamma * s.b(x)),
        a=conv(3, 4),
        b=conv(3, 4),
        c=conv(4, 2),
        gamma=nn.Parameter(torch.rand(4, 1, 1)),
    )
    check(model, [layer("a", i) | layer("b", i) | at("gamma", 0, i) | at("c.weight", 1, i) for i in range(4)], IMAGE)


def test_parameters_without_a_module():
    def forward(s, x):
        return F.conv2d(torch.relu(F.conv2d(x, s.w, s.bias, padding=1)), s.v)

    model = Net(
        forward,
        w=nn.Parameter(torch.randn(4, 3, 3, 3)),
        bias=nn.Parameter(torch.randn(4)),
        v=nn.Parameter(torch.randn(2, 4, 1, 1)),
    )
    check(model, [at("w", 0, i) | at("bias", 0, i) | at("v", 1, i) for i in range(4)], IMAGE)


def test_a_normalized_weight_leaves_with_its_length():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    stored = "0.parametrizations.weight.original"
    check(
        model,
        [at(f"{stored}0", 0, i) | at(f"{stored}1", 0, i) | at("0.bias", 0, i) | at("2.weight", 1, i) for i in range(4)],
        TOKENS,
    )


def test_a_table_of_relative_positions_loses_heads_and_its_index_nothing():
    def forward(s, x):
        q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in s.qkv(x).chunk(3, -1))
        bias = s.table[s.index.flatten()].unflatten(0, (5, 5)).permute(2, 0, 1)
        return s.out(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))

    model = Net(forward, qkv=nn.Linear(3, 12), out=nn.Linear(4, 3), table=nn.Parameter(torch.randn(9, 2)))
    model.register_buffer("index", torch.randint(0, 9, (5, 5)))
    expected = []
    for h in range(2):
        rows = [4 * block + 2 * h + d for block in range(3) for d in range(2)]
        expected.append(layer("qkv", *rows) | at("out.weight", 1, 2 * h, 2 * h + 1) | at("table", 1, h))
    structure = check(model, expected, TOKENS)
    assert structure.reasons["index", 0].startswith("it is an index in index (")
    assert structure.reasons["table", 0].startswith("it is picked by index in index (")


def test_a_module_used_twice_has_one_set_of_units():
    model = Net(lambda s, x: s.c(s.b(torch.relu(s.b(s.a(x))))), a=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2))
    check(
        model, [layer("a", i) | layer("b", i) | at("b.weight", 1, i) | at("c.weight", 1, i) for i in range(4)], TOKENS
    )


def test_transposed_convolutions_have_their_filters_along_the_second_axis():
    model = nn.Sequential(conv(3, 4), nn.ConvTranspose2d(4, 5, 2, stride=2), conv(5, 2))
    first = [layer("0", i) | at("1.weight", 0, i) for i in range(4)]
    check(model, first + [at("1.weight", 1, i) | at("1.bias", 0, i) | at("2.weight", 1, i) for i in range(5)], IMAGE)


def test_several_calls_are_one_model_and_what_each_returns_stays():
    model = Net(lambda s, x: x, enter=nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), leave=nn.Linear(3, 2))
    structure = find_units(model, [Call("enter", (TOKENS,)), Call("leave", (TOKENS,))])
    expected = [layer("enter.0", i) | at("enter.2.weight", 1, i) for i in range(4)]
    assert units(structure) == set(map(frozenset, expected))
    assert structure.reasons["leave.weight", 0] == "it is an output of the model"


def test_parameters_that_nothing_uses_are_left_alone():
    model = Net(lambda s, x: s.a(x), a=nn.Linear(3, 2), unused=nn.Linear(3, 4))
    structure = structure_of(model, TOKENS)
    assert structure.count == 0
    assert not any(slot.tensor.startswith("unused") for slot in structure.slots)


def test_a_head_of_train_mode_alone_loses_the_channels_it_reads():
    def forward(s, x):
        y = s.a(x)
        return (s.b(y), s.auxiliary(y)) if s.training else s.b(y)

    class Model(Net):
        def forward(self, x):
            y = self.a(x)
            return (self.b(y), self.auxiliary(y)) if self.training else self.b(y)

    members = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2), "auxiliary": nn.Linear(4, 2)}
    check(
        Model(forward, **members),
        [layer("a", i) | at("b.weight", 1, i) | at("auxiliary.weight", 1, i) for i in range(4)],
        TOKENS,
    )


def test_outputs_in_a_dictionary_stay_and_inputs_too():
    model = Net(lambda s, x, y: {"a": [s.b(s.a(x) + y)], "c": {"d": s.b(y)}}, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    structure = structure_of(model, TOKENS, torch.randn(2, 5, 4))
    assert structure.count == 0
    assert structure.reasons["b.weight", 0] == "it is an output of the model"
    assert "meets a tensor of fixed size there" in structure.reasons["a.weight", 0]
