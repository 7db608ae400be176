"""An SBF layer in a network of one's own: half the channels are computed, the others rebuilt.

Trains the same network twice on scikit-learn's handwritten digits, with nn.Conv2d and with
SBFConv2d in its place, and compares them.

    python examples/sbf_layer.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import sbf_dist


def conv(channels_in: int, channels_out: int, *, sbf: bool, stride: int = 1) -> nn.Module:
    """Make a 3 × 3 convolution; the SBF layer takes the place of nn.Conv2d, shapes included."""
    if not sbf:
        return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)
    # Half of the channels are computed; each of the others is the sum of 4 of these, each
    # transformed by a 3 × 3 kernel of its own that is learned.
    return sbf_dist.SBFConv2d(
        channels_in, channels_out, 3, kept=channels_out // 2, sources=4, stride=stride, padding=1
    )


class Net(nn.Sequential):
    """Three convolutions and a classifier, for 16 × 16 grey images."""

    def __init__(self, *, sbf: bool) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            conv(32, 64, sbf=sbf, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            conv(64, 64, sbf=sbf),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def digits() -> tuple[Tensor, Tensor]:
    """Return images (1797, 1, 16, 16) around 0, and their labels (1797,)."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size=16, mode="bilinear"), torch.tensor(found.target)


def main() -> None:
    parser = argparse.ArgumentParser(description="SBF layers in a network of one's own.")
    parser.add_argument("--steps", type=int, default=200, help="of the training of each network")
    arguments = parser.parse_args()
    images, labels = digits()
    train, held_out = slice(0, 1297), slice(1297, None)
    print(f"{'network':<10} {'top-1 %':>8} {'M MACs':>8} {'ms':>8}")
    for name in ("dense", "SBF"):
        torch.manual_seed(0)
        network = Net(sbf=name == "SBF")
        optimizer = torch.optim.AdamW(network.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=arguments.steps)
        for _ in range(arguments.steps):
            batch = torch.randint(train.stop, (64,))
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.inference_mode():
            top1 = (network(images[held_out]).argmax(1) == labels[held_out]).float().mean()
        cost = sbf_dist.count(network, (1, 16, 16))
        # Fused for inference: batch norms folded, activations within the convolutions.
        (ms,) = sbf_dist.latencies([sbf_dist.optimize(network)], (1, 16, 16))
        print(f"{name:<10} {100 * top1:8.1f} {cost.macs / 1e6:8.2f} {ms:8.3f}")


if __name__ == "__main__":
    main()
