"""The network whose outputs a converted network is fitted to."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reference:
    """A dense network, and which channels of its layers the network that is fitted still has.

    `channels` gives, by the name of a convolution or linear layer, the numbers of its output
    channels in `module` that are left, in order; layers that are not named have all.
    """

    module: nn.Module
    channels: dict[str, list[int]] = field(default_factory=dict)

    def select(self, name: str, outputs: Tensor) -> Tensor:
        """Return those channels of (N, C, …), a layer's outputs in `module`, that are left."""
        if name not in self.channels:
            return outputs
        left = torch.tensor(self.channels[name], device=outputs.device)
        return outputs.index_select(1, left)
