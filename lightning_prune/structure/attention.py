"""Multi-head attention whose heads can be removed: a drop-in for :class:`torch.nn.MultiheadAttention`.

torch's module (Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762) insists that all heads together are
as wide as the embedding. The drop-in computes the same from the same parameters under the same names, and takes the
number of heads from the weights. With ``E`` the embedding, ``D`` the width of a head, which never changes, and ``H``
the heads that are left (``H D = E`` while all are there)::

    in_proj_weight [3 H D, E], or q_proj_weight [H D, E], k_proj_weight [H D, kdim], v_proj_weight [H D, vdim]
    in_proj_bias [3 H D]    bias_k, bias_v [1, 1, H D]    out_proj.weight [E, H D]    out_proj.bias [E]

Head ``h`` is slice ``h D : (h + 1) D`` of each of the three blocks (query, key, value), of ``bias_k`` and ``bias_v``, and
of the columns of ``out_proj.weight``. Without it the output is what it was with the head's rows of the value block,
of its bias and of ``bias_v`` at zero. The averaged attention weights are not: they are a mean over one head less.

torch's fused inference kernels read the weights themselves and insist on ``H D = E``. They never run here: this class does
not call the one in its base class, and ``_qkv_same_embed_dim`` is always False, which is what ``nn.TransformerEncoderLayer``
asks before it takes the other. ``nn.TransformerEncoder`` may still hand over a nested tensor, because it decided when
it was constructed; the drop-in takes that.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from lightning_prune.errors import ModelError
from lightning_prune.structure.dropin import twin, why_not_called


class MultiheadAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` in plain operations, with any number of heads left.

    Constructor, attributes and parameters are those of torch's; ``num_heads`` is for those who read it, the forward
    counts the heads in the weights. Nested tensors are taken where torch takes them: self-attention without masks and
    weights, batch first.
    """

    def _reset_parameters(self) -> None:  # the constructor ends here, and it asks for the layout of the weights
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``; the meaning of every argument is torch's.

        Args:
            query: ``[L, B, E]``, with ``batch_first`` ``[B, L, E]``, without a batch ``[L, E]``.
            key: The same with ``S`` for ``L`` and ``kdim`` for ``E``.
            value: The same with ``S`` for ``L`` and ``vdim`` for ``E``.
            key_padding_mask: ``[B, S]`` or ``[S]``; True is ignored, a number is added to the scores.
            need_weights: Whether the attention weights are returned.
            attn_mask: ``[L, S]`` or ``[B H, L, S]``; True is not attended to, a number is added to the scores.
            average_attn_weights: Whether the weights returned are the mean over the heads.
            is_causal: A promise that ``attn_mask``, which must be there, is the causal one.

        Returns:
            The output, shaped as ``query``, and the weights: ``[B, L, S]``, per head ``[B, H, L, S]``, without a
            batch one dimension less; None if not needed. ``S`` grows by one with ``add_bias_kv`` and ``add_zero_attn`` each.

        Raises:
            ModelError: If shapes do not fit together, a mask is neither boolean nor floating, ``is_causal`` comes without
                a mask, or nested tensors come with what torch does not allow there.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            if not self.batch_first or query is not key or key is not value or need_weights or is_causal:
                raise _refused_nested()
            if key_padding_mask is not None or attn_mask is not None or query.layout is not torch.strided:
                raise _refused_nested()
            return self._attend_nested(query), None
        self._check(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise ModelError("Attention got is_causal=True without attn_mask: is_causal only says what the mask holds.")
        batched = query.dim() == 3
        first = self.batch_first or not batched
        q, k, v = self._heads(query, key, value, first)  # [B, H, L, D], [B, H, S, D] twice
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._scores_mask(attn_mask, key_padding_mask, q.shape[0], query.dtype)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            weights = self._weights(q, k, mask, dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        merged = heads.permute((0, 2, 1, 3) if first else (2, 0, 1, 3)).flatten(2)
        output = F.linear(merged, self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if batched:
            return output, weights
        return output.squeeze(0), None if weights is None else weights.squeeze(0)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Project and split; ``[B, H, L, D]`` for the query, ``[B, H, S, D]`` for key and value."""
        q, k, v = self._project(query, key, value)
        if query.dim() == 2:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        if self.bias_k is not None and self.bias_v is not None:
            row = (k.shape[0], 1, -1) if batch_first else (1, k.shape[1], -1)
            axis = 1 if batch_first else 0
            k, v = torch.cat([k, self.bias_k.expand(row)], axis), torch.cat([v, self.bias_v.expand(row)], axis)
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        q, k, v = (torch.unflatten(x, -1, (-1, self.head_dim)).permute(order) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return q, k, v

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Apply the three input projections; the last axis becomes ``H D``."""
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if packed is not None and query is key and key is value:
            return F.linear(query, packed, bias).chunk(3, dim=-1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return [F.linear(*given) for given in zip((query, key, value), weights, biases, strict=True)]

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Attention weights ``[B, H, L, S]``, after dropout as torch returns them."""
        scores = q * math.sqrt(1.0 / self.head_dim) @ k.transpose(-2, -1)
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        return F.dropout(weights, dropout) if dropout > 0.0 else weights

    def _scores_mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Merge the masks into what is added to the scores, broadcasting to ``[B, H, L, S]``."""
        merged: Tensor | None = None
        if attn_mask is not None:
            merged = _additive(attn_mask, "attn_mask", dtype)
            merged = torch.unflatten(merged, 0, (batch, -1)) if merged.dim() == 3 else merged
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, "key_padding_mask", dtype)
            padding = padding.view(batch, 1, 1, padding.shape[-1])
            merged = padding if merged is None else merged + padding
        appended = int(self.bias_k is not None) + int(self.add_zero_attn)
        return F.pad(merged, (0, appended)) if merged is not None and appended else merged

    def _attend_nested(self, query: Tensor) -> Tensor:
        """Self-attention of sequences of different lengths, padded for the time of it."""
        lengths = [len(sequence) for sequence in query.unbind()]
        padded = query.to_padded_tensor(0.0)
        positions = torch.arange(padded.shape[1], device=padded.device)
        padding = positions >= torch.tensor(lengths, device=padded.device).unsqueeze(1)
        output, _ = self.forward(padded, padded, padded, key_padding_mask=padding, need_weights=False)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(output, lengths, strict=True)])

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        """Refuse what torch refuses and broadcasting would let pass."""
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            raise ModelError(
                f"Attention takes tensors of 3 dimensions, or of 2 without a batch; got {_sizes(query, key, value)}."
            )
        axis = 1 if dims == 3 and self.batch_first else 0
        batch = () if dims == 2 else (query.shape[1 - axis],)
        if tuple(key.shape[:-1]) != tuple(value.shape[:-1]) or (batch and batch[0] != key.shape[1 - axis]):
            order = "batch, length" if axis else "length, batch"
            raise ModelError(
                f"Attention ({order}, features) needs one batch size, and key and value of one length; "
                f"got {_sizes(query, key, value)}."
            )
        length, source = query.shape[axis], key.shape[axis]
        if key_padding_mask is not None and tuple(key_padding_mask.shape) != (*batch, source):
            raise ModelError(
                f"key_padding_mask has shape {list(key_padding_mask.shape)}, expected {[*batch, source]} "
                f"for {_sizes(query, key, value)}."
            )
        if attn_mask is not None:
            rows = (batch[0] if batch else 1) * (self.out_proj.weight.shape[1] // self.head_dim)
            if tuple(attn_mask.shape) not in ((length, source), (rows, length, source)):
                raise ModelError(
                    f"attn_mask has shape {list(attn_mask.shape)}, expected {[length, source]} or, with one mask per head, "
                    f"{[rows, length, source]} for {_sizes(query, key, value)}. Heads that were removed have no mask any more."
                )


def open_heads(mha: nn.MultiheadAttention) -> MultiheadAttention:
    """Return the drop-in for ``mha``, with whatever belongs to it: the same objects, not copies.

    Args:
        mha: torch's module itself, with all its heads; on any device, meta included. Left as it is.

    Returns:
        A drop-in that shares the Parameter objects, the ``out_proj`` module, the hooks with their handles, the training
        flag and every other attribute.

    Raises:
        ModelError: If the drop-in would compute something else, or could not be cut: a subclass, quantized or
            parametrized weights, a replaced or compiled forward, further parameters, sizes other than torch's.
    """
    reason = _why_not(mha)
    if reason is not None:
        raise ModelError(f"The heads of a {type(mha).__name__} cannot be opened: {reason}.")
    drop_in = twin(mha, MultiheadAttention)
    drop_in._qkv_same_embed_dim = False
    return drop_in


def close_heads(drop_in: MultiheadAttention) -> nn.MultiheadAttention:
    """Return torch's module for ``drop_in``; the inverse of :func:`open_heads`.

    Args:
        drop_in: What :func:`open_heads` returned, heads removed or not. Left as it is.

    Returns:
        A module that shares everything, as in :func:`open_heads`. If heads are gone, it has them all again: the
        parameters that had lost them are new ones, values undefined.

    Raises:
        ModelError: If ``drop_in`` is not exactly the drop-in.
    """
    if type(drop_in) is not MultiheadAttention:
        raise ModelError(
            f"Heads are closed on the {MultiheadAttention.__module__}.{MultiheadAttention.__name__} that open_heads "
            f"returned, got a {type(drop_in).__module__}.{type(drop_in).__name__}."
        )
    mha = twin(drop_in, nn.MultiheadAttention)
    mha._qkv_same_embed_dim = mha.in_proj_weight is not None
    mha.num_heads = mha.embed_dim // mha.head_dim
    for name, shape in _shapes(mha).items():
        owner, _, key = name.rpartition(".")
        old = getattr(mha.get_submodule(owner), key)
        if old is None or tuple(old.shape) == shape:
            continue
        if owner and mha.out_proj is drop_in.out_proj:
            mha.out_proj = twin(drop_in.out_proj, type(drop_in.out_proj))
            mha.out_proj.in_features = mha.embed_dim
        new = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
        mha.get_submodule(owner).register_parameter(key, new)
    return mha


def _shapes(mha: nn.MultiheadAttention) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that torch's module can have, by name."""
    width = mha.embed_dim
    return {
        "in_proj_weight": (3 * width, width),
        "q_proj_weight": (width, width),
        "k_proj_weight": (width, mha.kdim),
        "v_proj_weight": (width, mha.vdim),
        "in_proj_bias": (3 * width,),
        "bias_k": (1, 1, width),
        "bias_v": (1, 1, width),
        "out_proj.weight": (width, width),
        "out_proj.bias": (width,),
    }


def _why_not(mha: nn.Module) -> str | None:
    """Say why ``mha`` has no drop-in, as a phrase without full stop; None if it has one."""
    if parametrize.is_parametrized(mha) or any(parametrize.is_parametrized(child) for child in mha.children()):
        return "its parameters are parametrized (weight_norm, spectral_norm, ...): remove the parametrization first"
    if isinstance(mha, MultiheadAttention):
        return "they are open already"
    if "quantiz" in type(mha).__module__:
        return "it is quantized or prepared for it"
    if type(mha) is not nn.MultiheadAttention:
        return "only torch.nn.MultiheadAttention itself has a drop-in, and this class has code of its own"
    return why_not_called(mha) or _why_not_held(mha)


def _why_not_held(mha: nn.MultiheadAttention) -> str | None:
    if [name for name, _ in mha.named_modules()] != ["", "out_proj"] or next(mha.buffers(), None) is not None:
        return "it carries further modules or buffers (an adapter, a mask)"
    if type(mha.out_proj) not in (NonDynamicallyQuantizableLinear, nn.Linear):
        return f"its out_proj is a {type(mha.out_proj).__name__}, not a plain Linear"
    held: dict[str, Any] = dict(mha.named_parameters(remove_duplicate=False))
    needed = {"in_proj_weight"} if mha._qkv_same_embed_dim else {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    needed |= {"out_proj.weight"} | ({"bias_k", "bias_v"} if {"bias_k", "bias_v"} & set(held) else set())
    if needed - set(held):
        return (
            f"it has no parameter {min(needed - set(held))} (a pruning mask or an old weight_norm computes it, perhaps)"
        )
    further = set(held) - needed - {"in_proj_bias", "out_proj.bias"}
    if further:
        return f"it carries a further parameter {min(further)}"
    if mha.head_dim * mha.num_heads != mha.embed_dim:
        return f"{mha.num_heads} heads of {mha.head_dim} are not as wide as the embedding of {mha.embed_dim}"
    for name, expected in _shapes(mha).items():
        if name in held and type(held[name]) is not nn.Parameter:
            return f"its {name} is a {type(held[name]).__name__}, not a plain tensor (sharded, quantized, lazy)"
        if name in held and tuple(held[name].shape) != expected:
            return f"its {name} has shape {list(held[name].shape)}, expected {list(expected)}"
    return None


def _additive(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ModelError(f"{name} has type {mask.dtype}, expected torch.bool or a floating type.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"


def _refused_nested() -> ModelError:
    return ModelError(
        "Attention takes nested tensors only of the strided layout, batch first, as one tensor for query, key and value, without masks "
        "and without weights (need_weights=False). Pad the sequences and give a key_padding_mask instead."
    )
