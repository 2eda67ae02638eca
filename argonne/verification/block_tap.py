"""One pass of one block of a training step, seen without changing a bit of it.

A module's hooks would be traced into a compiled block, or be left out of it. So the tap stands where the
model calls the block, around its compiled code where it has some, and takes gradients from the nodes of the
autograd graph; no number passes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.fsdp import FSDPModule

from argonne.ranks.replicas import local_tensor
from argonne.verification.replicas import checksum
from model import ArgonneModel

ACTIVATIONS = ("input", "output", "gradient of the output", "gradient of the input")
"""What a tap keeps of the block's one pass, in the order in which it comes."""


def checksums(parameters: Mapping[str, Tensor]) -> Tensor:
    """(parameters,) int64 on their device: of the bits that this rank holds of each."""
    return torch.stack([checksum(local_tensor(parameter.detach())) for parameter in parameters.values()])


class BlockTap:
    """Keeps what block ``index`` is given and gives in its next forward and backward pass.

    To be put on between steps. Of that pass, the first micro-batch's, it holds copies: the four ACTIVATIONS
    as this rank has them, (batch, seq_len or local_seq_len, hidden_size); the slices of the block's weights
    when the forward pass began; the gradients of the weights from this micro-batch alone. ``remove`` it when
    the step has been taken.
    """

    def __init__(self, model: ArgonneModel, index: int) -> None:
        block: Any = model.blocks[index]
        self.index, self._block = index, block
        self.prefix = f"blocks.{index}."
        self.parameters: dict[str, nn.Parameter] = dict(block.named_parameters())
        """As the optimizer has them: DTensors under FSDP; names within the block."""
        self.document_ids: Tensor | None = None
        """(batch, seq_len), with document attention."""
        self.activations: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.before: Tensor | None = None
        """`checksums` of the parameters when the forward pass began."""
        self.after: Tensor | None = None
        """`checksums` when the gradient left the block."""
        self._compiled = vars(block).get("_compiled_call_impl")
        block._compiled_call_impl = self._call
        self._on_block = True
        self._hooks: list[Any] = [model.register_forward_pre_hook(self._note_documents, with_kwargs=True)]

    @property
    def complete(self) -> bool:
        """Whether the pass has been seen whole."""
        return (
            set(self.activations) == set(ACTIVATIONS)
            and set(self.gradients) == set(self.parameters)
            and self.after is not None
        )

    def remove(self) -> None:
        """Take off what is still on the model; what was kept stays."""
        self._leave_block()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _leave_block(self) -> None:
        if not self._on_block:
            return
        self._on_block = False
        if self._compiled is None:
            del self._block._compiled_call_impl
        else:
            self._block._compiled_call_impl = self._compiled

    def _note_documents(self, _: nn.Module, __: Any, kwargs: Mapping[str, Any]) -> None:
        if self._on_block:
            self.document_ids = kwargs.get("document_ids")

    def _call(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's one pass: every other one goes to the block itself."""
        self._leave_block()
        block = self._block
        self.before = checksums(self.parameters)
        self.weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._keep("input", hidden_states)
        if isinstance(block, FSDPModule):
            block.unshard()  # its own next action; from here on its modules hold what the products take
        in_use = dict(block.named_parameters())
        output = block(hidden_states, *args, **kwargs)
        self._keep("output", output)
        # Only now: what is compiled must not see a hook on what it is given.
        self._on_gradient(output, lambda grad: self._keep("gradient of the output", grad))
        self._on_gradient(hidden_states, self._leave_backward)
        for name, parameter in in_use.items():
            self._on_gradient(parameter, lambda grad, name=name: self._keep_gradient(name, grad))  # type: ignore[misc]
        return output

    def _on_gradient(self, tensor: Tensor, keep: Callable[[Tensor], None]) -> None:
        """Call ``keep`` with the gradient that arrives at ``tensor``, all its uses added up."""
        if not tensor.requires_grad:
            return
        edge = get_gradient_edge(tensor)
        place = edge.output_nr
        self._hooks.append(edge.node.register_prehook(lambda grads: keep(grads[place])))

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.activations.setdefault(name, tensor.detach().clone())

    def _keep_gradient(self, name: str, gradient: Tensor) -> None:
        if name not in self.gradients:  # a replica's nodes live on, through every micro-batch
            self.gradients[name] = gradient.detach().clone()

    def _leave_backward(self, gradient: Tensor) -> None:
        if self.after is None:
            self._keep("gradient of the input", gradient)
            self.after = checksums(self.parameters)
