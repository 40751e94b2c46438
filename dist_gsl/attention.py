"""Attention whose heads may have different numbers of channels: what `nn.MultiheadAttention` becomes when neurons leave it. Imports torch alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UnevenMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with as many channels of queries and keys, and of values, in each head as are left; it takes and gives the same.

    The scale of the logits stays that of the heads as they began. Parameters keep their names and order: rows of `in_proj_weight` are
    queries, keys, values, each head after head. It is never built from nothing: `fit_heads` turns the one into the other.
    """

    query_key_heads: tuple[int, ...]
    """The head of each channel of queries and keys."""
    value_heads: tuple[int, ...]
    """The head of each channel of values."""
    query_key_places: Tensor
    value_places: Tensor
    """(heads, channels of the widest): the channel that stands there."""
    value_order: Tensor
    """Where each channel of values stands."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if is_causal and attn_mask is None:
            raise RuntimeError("attention: is_causal says what attn_mask is, and needs it")
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        elif self.batch_first:  # as torch does, which is why `x += attention(x, x, x)[0]` can be trained: what is kept for it is a copy
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        sizes = [len(self.query_key_heads), len(self.query_key_heads), len(self.value_heads)]
        weights = self.in_proj_weight.split(sizes)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        q, k, v = (
            _by_head(F.linear(x, weight, bias), where)
            for x, weight, bias, where in zip(
                (query, key, value), weights, biases, (self.query_key_places, self.query_key_places, self.value_places), strict=True
            )
        )
        by_order = is_causal and key_padding_mask is None and not need_weights  # what attn_mask says then
        mask = None if by_order else self._mask(q, attn_mask, key_padding_mask)
        scale, dropout = self.head_dim**-0.5, self.dropout if self.training else 0.0
        given: Tensor | None = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) * scale
            given = (logits if mask is None else logits + mask).softmax(-1)
            given = F.dropout(given, dropout) if dropout else given
            out = given @ v
            given = given.mean(1) if average_attn_weights else given
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=by_order, scale=scale)
        # (batch, heads, positions, channels) -> (positions, batch, channels that are left)
        out = self.out_proj(out.permute(2, 0, 1, 3).flatten(2).index_select(2, self.value_order))
        if not is_batched:
            return out.squeeze(1), None if given is None else given.squeeze(0)
        return out.transpose(0, 1) if self.batch_first else out, given

    def _place(self) -> None:
        """Writes what follows from the heads."""
        device: Any = self.in_proj_weight.device
        for name, heads in (("query_key_places", self.query_key_heads), ("value_places", self.value_heads)):
            self.register_buffer(name, _places(heads, self.num_heads).to(device), persistent=False)
        stands = _places(self.value_heads, self.num_heads).flatten()
        order = torch.argsort(stands, stable=True)[: len(self.value_heads)].clone()  # channel by channel, those that stand for none are last
        self.register_buffer("value_order", order.to(device), persistent=False)

    def _load_from_state_dict(self, *given: Any, **options: Any) -> None:
        super()._load_from_state_dict(*given, **options)
        self._place()  # it may have come from another device, or from nowhere

    def _mask(self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """What is added to the logits, (batch or 1, heads or 1, queries, keys)."""
        merged = None
        if attn_mask is not None:
            added = _additive(attn_mask, q)
            merged = added.view(-1, self.num_heads, *added.shape[1:]) if added.dim() == 3 else added[None, None]
        if key_padding_mask is not None:
            added = _additive(key_padding_mask, q).view(-1, 1, 1, key_padding_mask.shape[-1])
            merged = added if merged is None else merged + added
        return merged


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(mask, float("-inf"))


def _by_head(x: Tensor, places: Tensor) -> Tensor:
    """(positions, batch, channels) -> (batch, heads, positions, channels of the widest head), with zeros where a head has fewer."""
    heads: Tensor = F.pad(x, (0, 1)).index_select(2, places.flatten()).unflatten(2, tuple(places.shape))
    return heads.permute(1, 2, 0, 3)


def heads_of(module: nn.MultiheadAttention) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The head of each channel of queries and keys, and of values."""
    if isinstance(module, UnevenMultiheadAttention):
        return module.query_key_heads, module.value_heads
    even = tuple(channel // module.head_dim for channel in range(module.embed_dim))
    return even, even


def fit_heads(module: nn.MultiheadAttention, kept: Tensor) -> None:
    """Makes a module whose rows of `in_proj_weight` were cut to `kept` (int64, of those before) work with the heads that are left."""
    query_key, value = heads_of(module)
    rows = kept.tolist()
    square = (module.embed_dim, module.embed_dim)
    if len(rows) == 3 * module.embed_dim and module.in_proj_weight.shape[1] == module.embed_dim and module.out_proj.weight.shape == square:
        return  # all of it
    queries = [r for r in rows if r < len(query_key)]
    values = [r - 2 * len(query_key) for r in rows if r >= 2 * len(query_key)]
    if len(rows) != 2 * len(queries) + len(values):
        raise RuntimeError("attention: queries and keys were cut to different channels")
    module.__class__ = UnevenMultiheadAttention
    assert isinstance(module, UnevenMultiheadAttention)
    module.query_key_heads, module.value_heads = tuple(query_key[r] for r in queries), tuple(value[r] for r in values)
    # torch's encoder layers read the weights past forward where these say that they may.
    module._qkv_same_embed_dim = False
    module._place()


def _places(heads: tuple[int, ...], num_heads: int) -> Tensor:
    """(heads, channels of the widest): which channel stands there; one past the last where none does."""
    mine = [[channel for channel, head in enumerate(heads) if head == number] for number in range(num_heads)]
    widest = max(1, *(len(channels) for channels in mine))
    return torch.tensor([channels + [len(heads)] * (widest - len(channels)) for channels in mine])
