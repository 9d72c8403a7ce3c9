import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import ModelError
from lightning_prune.structure.preserve import preserved
from tests.networks import conv_bn


def photograph(model: nn.Module) -> dict[str, object]:
    """Everything that must not change, written down without the code under test."""
    photo: dict[str, object] = {"keys": tuple(model.state_dict())}
    for name, module in model.named_modules():
        photo[f"{name}/training"] = module.training
        photo[f"{name}/attributes"] = tuple(vars(module))
        for hooks in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
            "_state_dict_hooks",
        ):
            photo[f"{name}/{hooks}"] = tuple(vars(module)[hooks])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        photo[name] = (
            id(tensor),
            tensor.dtype,
            tensor.requires_grad,
            tensor.is_leaf,
            tensor.detach().numpy().tobytes(),
        )
        if tensor.is_leaf:
            photo[f"{name}.grad"] = (id(tensor.grad), None if tensor.grad is None else tensor.grad.numpy().tobytes())
    return photo


def dice() -> tuple[object, ...]:
    """The states of all generators."""
    numpy = np.random.get_state(legacy=False)
    return random.getstate(), str(numpy), torch.get_rng_state().numpy().tobytes()


def trained() -> nn.Sequential:
    """A network in a mixed state: some gradients, some not, one frozen layer, one submodule in evaluation mode, hooks of its own."""
    model = conv_bn()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    model[3].weight.grad = None
    model[0].weight.requires_grad_(False)
    model[4].eval()
    model[9].register_forward_hook(lambda *_: None)
    return model


def scorer(model: nn.Module) -> None:
    """What a hostile but legal scorer does."""
    model.train()
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_: None)
        module.register_full_backward_hook(lambda *_: None)
    for parameter in model.parameters():
        parameter.requires_grad_(True).register_hook(lambda grad: grad * 2)
    x = torch.randn(4, 3, 8, 8) + random.random() + np.random.rand()
    model(x.requires_grad_()).square().sum().backward()
    model.zero_grad(set_to_none=False)
    model.register_buffer("scores", torch.zeros(3))
    model.add_module("observer", nn.Linear(2, 2))
    model.note = "scored"


@pytest.mark.parametrize("mode", [None, "eval", "train"])
@pytest.mark.parametrize("parameters", [False, True])
def test_a_scorer_leaves_everything_bit_identical(mode, parameters):
    model = trained()
    before, state = photograph(model), dice()
    with preserved(model, mode=mode, parameters=parameters):
        scorer(model)
        assert photograph(model) != before
    assert photograph(model) == before
    assert dice() == state


def test_everything_is_put_back_when_the_block_raises():
    model = trained()
    before, state = photograph(model), dice()
    with pytest.raises(ZeroDivisionError), preserved(model, mode="train"):  # noqa: PT012
        scorer(model)
        raise ZeroDivisionError
    assert photograph(model) == before
    assert dice() == state


def test_training_goes_on_as_if_nothing_had_been_asked():
    def losses(ask: bool) -> list[float]:
        torch.manual_seed(1)
        model, out = conv_bn(), []
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(4):
            model.zero_grad()
            loss = model(torch.randn(4, 3, 8, 8)).square().mean()
            loss.backward()
            if ask:
                with preserved(model):
                    scorer(model)
            optimizer.step()
            out.append(loss.item())
        return out

    assert losses(ask=True) == losses(ask=False)


@pytest.mark.parametrize(("mode", "expected"), [("eval", {False}), ("train", {True}), (None, {False, True})])
def test_mode_inside_is_the_one_asked_for(mode, expected):
    model = conv_bn()
    model[1].eval()
    with preserved(model, mode=mode):
        assert {module.training for module in model.modules()} == expected


def test_gradients_inside_start_from_none():
    model = trained()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    x = torch.randn(4, 3, 8, 8)
    with preserved(model):
        assert all(p.grad is None for p in model.parameters())
        torch.manual_seed(3)
        model(x).sum().backward()
        torch.manual_seed(3)
        expected(x).sum().backward()
        assert torch.equal(model[9].weight.grad, expected[9].weight.grad)


def test_a_gradient_that_another_object_writes_to_keeps_its_value():
    model = nn.Linear(2, 2)
    bucket = torch.arange(6.0)  # as in DDP, where gradients are views of a bucket
    model.weight.grad = bucket[:4].view(2, 2)
    with preserved(model):
        bucket.zero_()
    assert model.weight.grad.flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_written_weights_are_an_error_that_names_them():
    model = conv_bn()
    with pytest.raises(ModelError, match=r"1 parameter\(s\) were written to .*: 3\.bias\. .*manual optimization"):  # noqa: SIM117
        with preserved(model), torch.no_grad():
            model[3].bias.add_(1)


def test_the_error_of_the_block_wins_over_written_weights():
    model = conv_bn()
    with pytest.raises(KeyError), preserved(model):  # noqa: PT012
        with torch.no_grad():
            model[3].bias.add_(1)
        raise KeyError


def test_written_weights_are_put_back_if_asked_for():
    model = trained()
    before = photograph(model)
    with preserved(model, parameters=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        optimizer.step()
        model[9].weight.data.mul_(3)  # past the version counter
    assert photograph(model) == before


@pytest.mark.parametrize("parameters", [False, True])
def test_a_cast_model_gets_its_storage_back(parameters):
    model = trained()
    before, pointer = photograph(model), model[9].weight.data_ptr()
    with preserved(model, parameters=parameters):
        model.double()
        model[9].weight.data = torch.zeros(1)
    assert photograph(model) == before
    assert model[9].weight.data_ptr() == pointer


class Stateful(nn.Module):
    """Keeps state in every place but a parameter, as metrics and Lightning modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.zeros(2)
        self.seen: list[Tensor] = []
        self.log = {"steps": 0, "parts": {"losses": [1.0]}}
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("position", torch.zeros(1).expand(3))
        self.register_buffer("running", torch.full((2,), torch.nan))
        self.register_buffer("late", None)
        self.weight = nn.Parameter(torch.ones(2))
        self.teacher = [nn.BatchNorm1d(2)]  # hidden from modules()

    def forward(self, x: Tensor) -> Tensor:
        self.memory += 1
        self.seen.append(x)
        self.log["steps"] += 1  # type: ignore[operator]
        self.log["parts"]["losses"].append(2.0)  # type: ignore[index]
        self.position.data[0] = 5
        self.running.zero_().add_(self.weight)  # a buffer with a graph
        self.late = torch.ones(2)
        self.cache = torch.rand(2, generator=self.generator)
        return self.teacher[0](x) * self.weight


def test_state_outside_parameters_is_put_back():
    model = Stateful()
    teacher = model.teacher[0].state_dict()
    before = {name: tensor.clone() for name, tensor in teacher.items()}
    drawn = torch.rand(2, generator=torch.Generator().manual_seed(0))
    memory, running = model.memory, model.running
    with preserved(model):
        model(torch.randn(3, 2))
    assert model.memory is memory
    assert memory.tolist() == [0.0, 0.0]
    assert model.seen == []
    assert model.log == {"steps": 0, "parts": {"losses": [1.0]}}
    assert model.position.tolist() == [0.0, 0.0, 0.0]
    assert model.running is running
    assert running.isnan().all()
    assert not running.requires_grad
    assert model.late is None
    assert not hasattr(model, "cache")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.teacher[0].state_dict().items())
    assert torch.equal(torch.rand(2, generator=model.generator), drawn)


def test_gradient_mode_and_autocast_are_put_back():
    model = nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with preserved(model):
            torch.set_grad_enabled(False)
            torch.set_autocast_enabled("cpu", False)
            torch.set_autocast_dtype("cpu", torch.float16)
            torch.set_autocast_cache_enabled(False)
        assert torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_cache_enabled()


def test_casts_that_autocast_made_of_changed_weights_are_forgotten():
    model, x = nn.Linear(2, 2), torch.randn(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        with preserved(model, parameters=True):
            torch.clear_autocast_cache()
            model.weight.data.add_(1)
            assert not torch.equal(model(x), before)
        assert torch.equal(model(x), before)


def test_a_question_without_gradients_under_autocast_does_not_cut_off_the_weights():
    model = nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with preserved(model), torch.no_grad():
            model(torch.randn(1, 2))
        model(torch.randn(1, 2)).sum().backward()
    assert model.weight.grad is not None


def test_a_graph_that_was_recorded_before_still_runs_backward():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    loss = model(torch.randn(3, 2)).sum()
    with preserved(model, mode="train"):
        model(torch.randn(3, 2))
    loss.backward()  # fails where buffers were written back past a version counter
    assert model[0].weight.grad is not None


def test_buffers_changed_inside_and_saved_by_a_graph_are_not_bumped():
    buffer = torch.ones(2)
    model = nn.Module()
    model.register_buffer("scale", buffer)
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * model.scale).sum()
    with preserved(model):
        model.scale.data.mul_(2)
    loss.backward()
    assert weight.grad.tolist() == [1.0, 1.0]


def test_nested_blocks_each_put_back_what_they_found():
    model = conv_bn()
    with preserved(model, mode="eval"):
        with preserved(model, mode="train"):
            model(torch.randn(2, 3, 8, 8))
        assert not model.training
        assert model[1].num_batches_tracked == 0
    assert model.training


def test_scripted_submodules_are_put_back():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        scripted = torch.jit.script(nn.BatchNorm1d(2))
    model = nn.Sequential(scripted)
    with preserved(model, mode="eval"):
        assert not scripted.training
        scripted.train()(torch.randn(4, 2))
        assert scripted.running_mean.any()
        model.eval()
    assert scripted.training
    assert not scripted.running_mean.any()
    assert scripted.num_batches_tracked == 0


def test_lazy_parameters_are_refused():
    with pytest.raises(ModelError, match=r"no shape yet\. Run it once"), preserved(nn.LazyLinear(2)):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_model_and_generator_are_put_back():
    model = conv_bn().cuda()
    torch.cuda.manual_seed(0)
    expected = torch.randn(3, device="cuda")
    torch.cuda.manual_seed(0)
    buffer = model[1].running_mean
    with preserved(model, mode="train"):
        model(torch.randn(2, 3, 8, 8, device="cuda"))
        model.cpu()
    assert model[1].running_mean is buffer
    assert buffer.is_cuda
    assert not buffer.any()
    assert all(p.is_cuda for p in model.parameters())
    assert torch.equal(torch.randn(3, device="cuda"), expected)
