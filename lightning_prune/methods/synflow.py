"""SynFlow: weights chosen by how much of the network's own flow runs through them, without data.

Tanaka, Kunin, Yamins and Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020
(arXiv:2006.05467). With every tensor of the state dict replaced by its absolute value and the model in evaluation mode, ``R`` is the sum of the
outputs on an all-ones input, and the score of a weight is ``|dR/dw * w|``. In a network of positively homogeneous layers without biases
the scores of every layer sum to ``R``, so no layer runs dry before the others; hence many rounds, of which the i-th keeps the share
``rho^(i / rounds)`` (algorithm 1).

Unlike the authors' code: the flow runs in float64, because that of a deep network overflows float32; entries removed in an earlier round stay
removed; counts are exact, ties go by index. Where a model is not a stack of convolutions: integer and boolean inputs stay as they are and every
embedding gives ones, so that tokens flow alike; buffers that hold infinities (attention masks) keep their signs; all inputs are ones, all floating
outputs are summed. A model whose outputs always sum to the same, such as one that ends in a softmax, has no flow to go by and is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.budget.weights import Scope, select_weights
from lightning_prune.callback.checks import check_choice, check_integer
from lightning_prune.callback.masking import Schedule
from lightning_prune.callback.task import Task
from lightning_prune.callback.weights import WeightPruning
from lightning_prune.errors import ModelError
from lightning_prune.probe import FOREIGN
from lightning_prune.structure.calls import Call
from lightning_prune.structure.select import Pattern

_NO_FLOW = 1e-12  # what all scores together must exceed, as a share of R, not to be rounding


def make_positive_(model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
    """Replace what a state dict holds by its absolute value, and let every embedding give ones; in place.

    Parameters get new storage. Call it inside :func:`lightning_prune.structure.preserve.preserved`, which puts the old one back and takes the
    hooks of the embeddings away.

    Args:
        model: The model.
        dtype: Type of its floating tensors from now on.
    """
    for module in model.modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or not tensor.is_floating_point():
                continue
            value = tensor.data.to(dtype, copy=True)
            in_state = name not in module._non_persistent_buffers_set
            tensor.data = value.abs_() if in_state and not value.isinf().any() else value
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.register_forward_hook(lambda _module, _args, output: torch.ones_like(output))


def ones(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Return inputs of the same structure and shapes with ones in the floating tensors; everything else stays.

    Args:
        value: A tensor, or nested tuples, lists and dicts of them and of other values.
        dtype: Type of the floating tensors.
    """
    return tree_map_only(Tensor, lambda t: torch.ones_like(t, dtype=dtype) if t.is_floating_point() else t, value)


def total_flow(model: nn.Module, calls: Sequence[Call]) -> Tensor:
    """Return ``R``, the sum of all floating outputs, a scalar in float64 with its graph.

    Args:
        model: The model, positive (:func:`make_positive_`).
        calls: Calls of it with the inputs to use.

    Raises:
        ModelError: If the model does not run on them, or no output depends on its parameters.
    """
    try:
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # its RNNs have no gradient in eval mode
            leaves = [leaf for call in calls for leaf in tree_leaves(call.run(model))]
    except FOREIGN as error:
        raise ModelError(
            f"SynFlow runs {type(model).__name__} on all-ones inputs with absolute weights, and it raised {type(error).__name__}: "
            f"{' '.join(str(error).split())}. If its code asks for a type of its own, pass dtype='float32'."
        ) from error
    with torch.enable_grad():
        sums = [leaf.double().sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        flow = torch.stack(sums).sum() if sums else torch.zeros(())
    if not flow.requires_grad:
        raise ModelError(
            f"SynFlow: no floating output of {type(model).__name__} depends on its parameters by a gradient. Give example inputs of a "
            "part of the model that is differentiable."
        )
    return flow


def flow_scores(flow: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``|dR/dw * w|`` for every weight; what ``R`` does not depend on scores 0.

    Args:
        flow: ``R``, a scalar with its graph.
        weights: Leaves of the graph, by name.

    Raises:
        ModelError: If a score is not finite.
    """
    gradients = torch.autograd.grad(flow, list(weights.values()), allow_unused=True)
    scores = {}
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        scores[name] = torch.zeros_like(weight) if gradient is None else (gradient * weight.detach()).abs()
        if not scores[name].isfinite().all():
            raise ModelError(
                f"SynFlow: the flow through {name!r} is not finite (R is {float(flow.detach()):.3g}). The network is too deep for {weight.dtype}, "
                "or its code breaks on absolute weights and all-ones inputs; prune it by another method."
            )
    return scores


def counts_by_round(total: int, count: int, rounds: int) -> list[int]:
    """Return how many of ``total`` entries are gone after each round, by the shares ``rho^(i / rounds)``; the last is ``count``."""
    rho = (total - count) / total
    return [*(total - round(total * rho ** (i / rounds)) for i in range(1, rounds)), count]


def choose_by_flow(
    model: nn.Module,
    calls: Sequence[Call],
    weights: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor],
    counts: Sequence[int],
    choose: Callable[[Mapping[str, Tensor], Mapping[str, Tensor], int], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Remove weights in rounds, scoring anew before each.

    Args:
        model: The model, positive and in evaluation mode; the values of ``weights`` are overwritten.
        calls: Calls of it with all-ones inputs.
        weights: The prunable parameters of the model, by name.
        kept: Entries that are there, boolean.
        counts: How many entries are to be gone after each round.
        choose: ``choose(scores, kept, count)`` returns which entries stay.

    Returns:
        Which entries stay, boolean, by name.

    Raises:
        ModelError: If the model does not run, its flow does not depend on the weights, or it overflows.
    """
    values, kept = {name: weight.data.clone() for name, weight in weights.items()}, dict(kept)
    gone, scored = sum(int((~mask).sum()) for mask in kept.values()), False
    for count in counts:
        if count <= gone:
            continue
        for name, weight in weights.items():
            weight.data = values[name] * kept[name]
        flow = total_flow(model, calls)
        scores = flow_scores(flow, weights)
        if not scored and not sum(float(score.sum()) for score in scores.values()) > _NO_FLOW * float(flow.detach()):
            raise ModelError(
                f"SynFlow: the outputs of {type(model).__name__} sum to {float(flow.detach()):.4g} whatever the weights are, as after a softmax or a "
                "normalization. Let `forward`, or the submodule that the example inputs are for, return logits; or prune by another method."
            )
        kept, gone, scored = choose(scores, kept, count), count, True
    return kept


class SynFlow(WeightPruning):
    """Remove the weights through which least of the network's flow runs; no data, no labels, made for untrained networks.

    Args:
        sparsity: Share of the weights that leave, in [0, 1), of the dense model's.
        rounds: Rounds in which they leave, scored anew before each; 100 in the paper.
        dtype: Type in which the flow runs: ``"float64"``, or ``"float32"`` for models whose code insists on it.
        scope: ``"global"``: scores compete over all layers, as in the paper. ``"uniform"``: the same share of every layer leaves. ``"erk"``:
            densities of Erdos-Renyi kernels.
        min_kept: At least so many weights of every tensor stay.
        remove_dead: Whether channels whose weights are all gone leave the model.
        include: Layers whose weights may leave: names, globs or module types; None takes all.
        exclude: Layers whose weights stay, likewise.
        start_epoch: First epoch in which a gradual run masks.
        until_epoch: Epoch at whose start a gradual run has reached its target; None prunes at the start of the fit.
        every_n_epochs: Epochs between the steps of a gradual run.
        schedule: How the target is approached: ``"cubic"`` or ``"linear"``.
        recalibrate_bn: Batches to estimate the statistics of batch normalization from afterwards; 0 leaves them.

    Raises:
        OptionError: If an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        sparsity: float,
        rounds: int = 100,
        dtype: Literal["float64", "float32"] = "float64",
        scope: Scope = "global",
        min_kept: int = 0,
        remove_dead: bool = True,
        include: Pattern | Sequence[Pattern] | None = None,
        exclude: Pattern | Sequence[Pattern] | None = None,
        start_epoch: int = 0,
        until_epoch: int | None = None,
        every_n_epochs: int = 1,
        schedule: Schedule = "cubic",
        recalibrate_bn: int = 8,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            scope=scope,
            min_kept=min_kept,
            remove_dead=remove_dead,
            include=include,
            exclude=exclude,
            start_epoch=start_epoch,
            until_epoch=until_epoch,
            every_n_epochs=every_n_epochs,
            schedule=schedule,
            recalibrate_bn=recalibrate_bn,
        )
        self.rounds, self.dtype = rounds, dtype
        check_integer(self, "rounds", 1)
        check_choice(self, "dtype", ("float64", "float32"))

    def choose_weights(
        self, task: Task, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor], count: int
    ) -> Mapping[str, Tensor]:
        """Choose in rounds; the model is put back bit for bit.

        Raises:
            ModelError: If the model does not run on all-ones inputs, its flow does not depend on the weights, or it overflows.
        """
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        calls = [Call(call.module, ones(call.args, dtype), ones(call.kwargs, dtype)) for call in task.calls]
        counts = counts_by_round(sum(weight.numel() for weight in weights.values()), count, self.rounds)
        with task.probe.quiet(mode="eval"):
            make_positive_(task.model, dtype)
            return choose_by_flow(
                task.model,
                calls,
                weights,
                kept,
                counts,
                lambda scores, there, gone: select_weights(scores, there, gone, self.scope, self.min_kept),
            )
