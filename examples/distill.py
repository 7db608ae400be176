"""Distillation in a plain PyTorch loop: two teachers, a compressed student, few labels.

100 of scikit-learn's handwritten digits have a label. Two teachers are trained on these; the
first is compressed to half of its multiply-adds, and the result is taught by both on all images.

    python examples/distill.py
"""

import argparse
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import sbf_dist
from sbf_dist.models import build

UNKNOWN = -1  # the label of an image that has none


def digits() -> tuple[Tensor, Tensor]:
    """Return images (1797, 3, 16, 16) around 0, and their labels (1797,)."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=16, mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(found.target)[order]


def train(
    network: nn.Module, loss_of: Callable[[Tensor, float], Tensor], images: int, steps: int
) -> None:
    """Minimise loss_of(numbers of the batch's images, share of the training that is over)."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        loss = loss_of(torch.randint(images, (64,)), step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (network(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Distillation in a plain PyTorch loop.")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--model", default="cifar_resnet14_w8", help="of the teachers")
    parser.add_argument("--macs", type=float, default=0.5, help="share of multiply-adds to keep")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images, labels = digits()
    held_out = images[1297:], labels[1297:]
    images, labels = images[:1297], labels[:1297]

    teachers = [build(arguments.model, 10) for _ in range(2)]
    for teacher in teachers:
        train(
            teacher,
            lambda batch, _, network=teacher: F.cross_entropy(
                network(images[batch % 100]), labels[batch % 100]
            ),
            100,
            arguments.steps,
        )
    dense = teachers[0]

    student, plan = sbf_dist.compress(dense, images[:256], macs=arguments.macs)
    before = accuracy(student, *held_out)

    # The loss: labels where there are any, and KL from the mean of the teachers' predictions.
    task = sbf_dist.DistillationTask(student, label_weight=1.0, teacher_weight=(1.0, 0.5))
    known = labels.where(torch.arange(len(labels)) < 100, UNKNOWN)

    def loss_of(batch: Tensor, progress: float) -> Tensor:
        with torch.no_grad():
            predictions = [teacher(images[batch]).softmax(1) for teacher in teachers]
        return task(
            {
                "image": images[batch],
                "label": known[batch],
                "teacher": torch.stack(predictions).mean(0),
                "progress": torch.tensor(progress),
            }
        )["loss"]

    train(task, loss_of, len(images), arguments.steps)

    shape = tuple(images.shape[1:])
    ms = sbf_dist.latencies([sbf_dist.optimize(network) for network in (dense, student)], shape)
    print(f"{'network':<20} {'top-1 %':>8} {'M MACs':>8} {'ms':>8}")
    for name, top1, macs, latency in (
        ("dense teacher", accuracy(dense, *held_out), plan.macs_before, ms[0]),
        ("compressed", before, plan.macs_after, ms[1]),
        ("… and distilled", accuracy(student, *held_out), plan.macs_after, ms[1]),
    ):
        print(f"{name:<20} {100 * top1:8.1f} {macs / 1e6:8.2f} {latency:8.3f}")


if __name__ == "__main__":
    main()
