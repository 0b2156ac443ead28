"""Initialises a larger network from a trained smaller one.

The idea is Net2Net's (Chen et al., "Net2Net: Accelerating Learning via Knowledge Transfer", 2016):
the larger network keeps what the smaller one has learned. Here the new channels are initialised at
random, and the weights from new channels to old ones start at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kp_frontend.network import KeypointNetwork, weights


@torch.no_grad()
def grow(small: KeypointNetwork, network: KeypointNetwork) -> None:
    """Copy the weights of `small` into `network`, in place.

    Afterwards the first channels of `network` compute what those of `small` do: its keypoint logits
    equal those of `small`, and its descriptors start with those of `small`. The exception are
    convolutions that `small` does not have (deeper levels), which add their random output.

    Raises:
        ValueError: a level of `small` is wider or deeper than in `network`.
    """
    state = weights(network)
    for name, old in weights(small).items():
        new = state.get(name)
        if new is None or any(n < o for n, o in zip(new.shape, old.shape, strict=True)):
            raise ValueError(
                f"cannot start from a larger network: {name} of {small.config} "
                f"does not fit into {network.config}"
            )
        _insert(old, new, transposed=name == "detector.up.weight")


def _insert(old: Tensor, new: Tensor, transposed: bool) -> None:
    """Copy a layer's weights into the first channels; they ignore the new inputs.

    Kernels are (outputs, inputs, ...), those of a transposed convolution (inputs, outputs, ...).
    """
    if old.ndim > 1:
        kernel = new.transpose(0, 1) if transposed else new
        outputs, inputs = (old.transpose(0, 1) if transposed else old).shape[:2]
        kernel[:outputs, inputs:] = 0.0
    new[tuple(slice(n) for n in old.shape)] = old
