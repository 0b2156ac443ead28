"""A larger network that starts as a trained smaller one.

The idea is Net2Net's (Chen et al., "Net2Net: Accelerating Learning via Knowledge Transfer", 2016):
what the small network has learned need not be learned again. Here the new channels start at
random, as in any network, but the channels that were there do not listen to them yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kp_frontend.network import KeypointNetwork, weights


@torch.no_grad()
def grow(small: KeypointNetwork, network: KeypointNetwork) -> None:
    """Make the channels of a new network, as far as `small` has them, compute what they do there.

    So its keypoint logits are those of `small`, and its descriptors begin with those of `small`.
    Convolutions that `small` has not (deeper levels) are the exception: they add what they start
    with.

    Raises:
        ValueError: a level of `small` is wider or deeper than in `network`.
    """
    state = weights(network)
    for name, old in weights(small).items():
        new = state.get(name)
        if new is None or any(n < o for n, o in zip(new.shape, old.shape, strict=True)):
            raise ValueError(
                f"a network cannot shrink, or lose layers: {name} of {small.config} "
                f"does not fit into {network.config}"
            )
        _insert(old, new, transposed=name == "detector.up.weight")


def _insert(old: Tensor, new: Tensor, transposed: bool) -> None:
    """Make the first channels of a layer the old ones, deaf to inputs that they did not have.

    Kernels are (outputs, inputs, ...), those of a transposed convolution (inputs, outputs, ...).
    """
    if old.ndim > 1:
        kernel = new.transpose(0, 1) if transposed else new
        outputs, inputs = (old.transpose(0, 1) if transposed else old).shape[:2]
        kernel[:outputs, inputs:] = 0.0
    new[tuple(slice(n) for n in old.shape)] = old
