"""Rebuilding, removing and combinations of both at equal multiply-adds, before and after training.

scikit-learn's digits (16 x 16, with noise) and a small ResNet. Each candidate of the joint planner
is measured as it was fitted, and after equally long distillation from the dense network; what the
planner would have chosen, by its own measure on calibration images, is marked.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbf_dist import models
from sbf_dist.compression.calibration import Calibration
from sbf_dist.compression.joint import SHARES, JointPlanner
from sbf_dist.compression.removal.probe import Probe, train_briefly
from sbf_dist.settings import Compression

SIDE = 16
CALIBRATION = 512


@dataclass(frozen=True)
class Row:
    """One candidate: accuracies and the planner's measure."""

    seed: int
    budget: float
    share: float
    macs: float
    divergence: float  # after the probe, on held-out calibration images
    fitted: float  # top-1 without any training
    trained: float  # after distillation


def digits(noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels (1,297), test images and labels (500), normalised."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, (SIDE, SIDE), mode="bicubic").expand(-1, 3, -1, -1)
    generator = torch.Generator().manual_seed(0)
    images = images + noise * torch.randn(images.shape, generator=generator)
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=generator)
    labels = torch.tensor(raw.target)
    train, test = order[:1297], order[1297:]
    return images[train], labels[train], images[test], labels[test]


def train_dense(name: str, images: Tensor, labels: Tensor, steps: int, seed: int) -> nn.Module:
    """Train the dense network on the labels, with shifts."""
    torch.manual_seed(seed)
    model = models.build(name, 10).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    for _ in range(steps):
        drawn = torch.randint(0, len(images), (64,))
        top, left = torch.randint(0, 5, (2,)).tolist()
        x = padded[drawn, :, top : top + SIDE, left : left + SIDE]
        loss = F.cross_entropy(model(x), labels[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose class is found."""
    return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="cifar_resnet14")
    parser.add_argument("--noise", type=float, default=0.5, help="of pixels, black to white = 1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--dense-steps", type=int, default=400)
    parser.add_argument("--probe-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=300, help="of distillation")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    images, labels, test, wanted = digits(arguments.noise)
    rows: list[Row] = []
    for seed in range(arguments.seeds):
        dense = train_dense(arguments.model, images, labels, arguments.dense_steps, seed)
        print(f"seed {seed}: dense {accuracy(dense, test, wanted):.3f}", flush=True)
        everything = Calibration.of(images)
        distillation = Probe(steps=arguments.steps)
        for budget in arguments.budgets:
            planner = JointPlanner(
                dense,
                images[:CALIBRATION],
                Compression(macs=budget),
                name=arguments.model,
                probe=Probe(steps=arguments.probe_steps),
                seed=seed,
            )
            for share in SHARES:
                candidate = planner.candidate(share)
                trained = train_briefly(dense, candidate.student, everything, distillation, seed)
                row = Row(
                    seed=seed,
                    budget=budget,
                    share=share,
                    macs=candidate.plan.macs_after / candidate.plan.macs_before,
                    divergence=candidate.divergence,
                    fitted=accuracy(candidate.student, test, wanted),
                    trained=accuracy(trained, test, wanted),
                )
                rows.append(row)
                print(row, flush=True)
            best = min(rows[-len(SHARES) :], key=lambda row: row.divergence)
            print(f"seed {seed}, {budget}: share {best.share:g} is chosen", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
