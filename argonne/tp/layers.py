"""Column- and row-parallel linear layers, and the vocabulary-parallel embedding.

A linear layer is y = x W^T with W (out_features, in_features). Cutting W by columns of W^T (output
features) needs no communication forward: each rank makes its own outputs from the whole x, and the
gradient of x, a sum over all outputs, is what has to be reduced backward. Cutting by rows of W^T (input
features) is the mirror image: each rank holds part of x, the outputs are partial sums to be reduced
forward, and backward needs nothing. A column layer followed by a row layer therefore costs one collective
forward (at the row layer's exit) and one backward (at the column layer's entrance): Shoeybi et al. 2019.

Under sequence parallelism (Korthikanti et al. 2022) what lies between the blocks is a slice of the
sequence: the entrance gathers it, the exit reduce-scatters, and the gradients mirror that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argonne.tp.cpu_products import linear
from argonne.tp.fused import column_products
from argonne.tp.group import TPGroup
from argonne.tp.precision import autocast_dtype, can_be_read
from argonne.tp.regions import (
    SequenceState,
    gather_from_region,
    reduce_from_region,
    reduce_scatter_sequence,
    scatter_to_region,
)
from argonne.tp.slices import even_cut, padded_slice_size


class ColumnParallelLinear(nn.Module):
    """A linear layer whose output features are divided over the tensor-parallel group.

    y = x W^T + b, with rank r of n holding the r-th run of rows of W (columns of W^T) and of b::

        weight  (local_out_features, in_features)   local_out_features = out_features / n
        bias    (local_out_features,)
        x       (..., in_features)                  equal on all ranks
        y       (..., local_out_features)           this rank's features
                (..., out_features)                 with gather_output, equal on all ranks

    Forward needs no communication, since each output is made from the whole x (``gather_output`` adds an
    all-gather). Backward all-reduces the gradient of x: each rank has only the part that flowed through its
    own outputs. Leave the output divided and follow with a `RowParallelLinear`: the two together cost one
    collective each way (Shoeybi et al. 2019, section 3)::

        up = ColumnParallelLinear(64, 256, group=group)
        down = RowParallelLinear(256, 64, group=group)
        y = down(torch.relu(up(x)))

    out_features need not divide: local_out_features is rounded up, and the surplus is padding, zero in
    weight and bias, which ``gather_output`` strips.

    Initial values are those that ``torch.nn.Linear`` would draw from the same random state, which must
    therefore be the same on all ranks; the unsharded layer exists for a moment. The caller fills meta tensors
    and layers given their ``local_out_features``.

    Args:
        group: the tensor-parallel group.
        gather_output: return all features on every rank; the backward pass then expects a gradient that is
            equal on all ranks, as it is when all compute the same from y.
        enter_region: False leaves the reduction of x's gradient to the caller, for layers that share one.
        sequence: with sequence parallelism enabled in it, x is (batch, local_seq_len, in_features), gathered
            here to ``sequence.seq_len`` positions, and its gradient is reduce-scattered.
        local_out_features: extent of the slice where it is not an even share (key/value heads).
        transposed: store the weight as (in_features, local_out_features), GPT-2's way.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: TPGroup,
        gather_output: bool = False,
        enter_region: bool = True,
        sequence: SequenceState | None = None,
        local_out_features: int | None = None,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.local_out_features = local_out_features or padded_slice_size(out_features, group.size)
        self.group, self.sequence = group, sequence
        self.gather_output, self.enter_region = gather_output, enter_region
        self.transposed = transposed
        self.weight = _empty_matrix(self.local_out_features, in_features, transposed, device, dtype)
        self.bias = (
            nn.Parameter(torch.empty(self.local_out_features, device=device, dtype=dtype)) if bias else None
        )
        if local_out_features is None and not self.weight.is_meta:
            whole = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
            _keep_slice(self.matrix, whole.weight, group, 0)
            if self.bias is not None:
                _keep_slice(self.bias, whole.bias, group, 0)

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features), also where it is stored transposed."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.enter_region:
            (y,) = column_products(x, [self.matrix], [self.bias], self.group, self.sequence)
        else:
            y = linear(x, self.matrix, self.bias)
        if not self.gather_output:
            return y
        return gather_from_region(y, self.group)[..., : self.out_features]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"local_out_features={self.local_out_features}, bias={self.bias is not None}"
        )


class RowParallelLinear(nn.Module):
    """A linear layer whose input features are divided over the tensor-parallel group.

    y = x W^T + b, with rank r of n holding the r-th run of columns of W (rows of W^T), and b whole::

        weight  (out_features, local_in_features)   local_in_features = in_features / n
        bias    (out_features,)                     equal on all ranks
        x       (..., local_in_features)            this rank's features: a column layer's output
                (..., in_features)                  with input_is_parallel=False, equal on all ranks
        y       (..., out_features)                 equal on all ranks

    Each rank's product is a partial sum over its own inputs: forward all-reduces it and adds the bias after
    that, once. Backward needs no communication, since the gradient of y is equal on all ranks (with
    ``input_is_parallel=False`` the parts of x's gradient are gathered).

    in_features need not divide: local_in_features is rounded up, and the surplus columns are zero.

    Initial values are those that ``torch.nn.Linear`` would draw from the same random state, which must
    therefore be the same on all ranks. The caller fills meta tensors and layers given their
    ``local_in_features``.

    Args:
        group: the tensor-parallel group.
        input_is_parallel: x is already divided. False: each rank takes its own features of the whole x.
        sequence: with sequence parallelism enabled in it, the partial sums are reduce-scattered and y is
            (batch, local_seq_len, out_features); the gradient of the bias, from this rank's positions only,
            must be summed over the group.
        local_in_features: extent of the slice where it is not an even share.
        transposed: store the weight as (local_in_features, out_features), GPT-2's way.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: TPGroup,
        input_is_parallel: bool = True,
        sequence: SequenceState | None = None,
        local_in_features: int | None = None,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.local_in_features = local_in_features or padded_slice_size(in_features, group.size)
        self.group, self.sequence, self.input_is_parallel = group, sequence, input_is_parallel
        self.transposed = transposed
        self.weight = _empty_matrix(out_features, self.local_in_features, transposed, device, dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if local_in_features is None and not self.weight.is_meta:
            whole = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
            _keep_slice(self.matrix, whole.weight, group, 1)
            if self.bias is not None:
                self.bias.detach().copy_(whole.bias)

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features), also where it is stored transposed."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        if not self.input_is_parallel:
            missing = self.group.size * self.local_in_features - self.in_features
            x = scatter_to_region(F.pad(x, (0, missing)) if missing else x, self.group)
        if self.group.size == 1:
            return linear(x, self.matrix, self.bias)
        # Product and exit are two nodes: recomputation ends once the product's input is back, and spares
        # the collective of a block's last exit.
        return self.leave(linear(x, self.matrix))

    def leave(self, partial: Tensor) -> Tensor:
        """Sum this rank's product, which may be overwritten, over the group and add the bias."""
        if self.sequence is not None and self.sequence.enabled:
            y = reduce_scatter_sequence(partial, self.group)
        else:
            y = reduce_from_region(partial, self.group, owned=True)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, local_in_features={self.local_in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows, one per id, are divided over the tensor-parallel group::

        weight  (local_num_embeddings, embedding_dim)   local_num_embeddings = num_embeddings / n, rounded up
        ids     (batch, seq_len)                        equal on all ranks
        output  (batch, seq_len, embedding_dim)         equal on all ranks

    A rank looks up the ids in its slice and contributes zero for the others, so the sum over the group, one
    all-reduce, is the look-up. Backward needs no communication: the gradient of the output is equal on all
    ranks, and each keeps the rows of its own ids. The weight of a tied head is this very slice.

    Initial values are those that ``torch.nn.Embedding`` would draw from the same random state; padding is
    zero. ``padding_idx`` is as there: its row starts at zero and gets no gradient.

    Args:
        group: the tensor-parallel group.
        sequence: with sequence parallelism enabled in it, the sum is reduce-scattered and the output is
            (batch, local_seq_len, embedding_dim).
        local_num_embeddings: extent of the slices where they are padded further; the caller fills them.

    Raises:
        IndexError: an id outside the vocabulary, on the CPU (as torch does). Ids on a GPU are not
            checked, since that would cost a synchronisation; such an id gives zeros.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        group: TPGroup,
        padding_idx: int | None = None,
        sequence: SequenceState | None = None,
        local_num_embeddings: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.local_num_embeddings = local_num_embeddings or padded_slice_size(num_embeddings, group.size)
        self.vocab_start = group.rank * self.local_num_embeddings
        self.group, self.sequence = group, sequence
        self.weight = nn.Parameter(
            torch.empty(self.local_num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        on_meta = self.weight.is_meta
        whole = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, device="meta" if on_meta else device, dtype=dtype
        )
        self.padding_idx = whole.padding_idx  # counted from the start
        if local_num_embeddings is None and not on_meta:
            _keep_slice(self.weight, whole.weight, group, 0)

    def forward(self, ids: Tensor) -> Tensor:
        padded = self.local_num_embeddings * self.group.size > self.num_embeddings
        if can_be_read(ids) and (padded or self.group.size > 1):
            wrong = (ids < 0) | (ids >= self.num_embeddings)
            if bool(wrong.any()):
                raise IndexError(f"an id is outside the vocabulary of {self.num_embeddings}")
        if self.group.size == 1:
            return F.embedding(ids, self.weight, self.padding_idx)
        local = ids - self.vocab_start
        outside = (local < 0) | (local >= self.local_num_embeddings)
        padding = None if self.padding_idx is None else self.padding_idx - self.vocab_start
        if padding is not None and not 0 <= padding < self.local_num_embeddings:
            padding = None
        part = F.embedding(local.masked_fill(outside, 0), self.weight, padding)
        dtype = autocast_dtype(part)
        if dtype is not None:
            part = part.to(dtype)
        part.masked_fill_(outside[..., None], 0.0)  # rows that nobody else holds
        if self.sequence is not None and self.sequence.enabled:
            return reduce_scatter_sequence(part, self.group)
        return reduce_from_region(part, self.group)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, local_num_embeddings={self.local_num_embeddings}"
        )


def _empty_matrix(
    out_features: int,
    in_features: int,
    transposed: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def _keep_slice(local: Tensor, whole: Tensor, group: TPGroup, dimension: int) -> None:
    """Fill ``local`` with this rank's even share of ``whole`` along ``dimension``; padding becomes zero."""
    into, source = local.detach().zero_(), whole.detach()
    for piece in even_cut(source.shape[dimension], group.size, dimension).pieces[group.rank]:
        part = source.narrow(dimension, piece.start, piece.size)
        into.narrow(dimension, piece.local_start, piece.size).copy_(part)
