"""A network of torchvision's, compressed without training, and what that costs in accuracy.

With a folder of images (FOLDER/CLASS/*.jpg) and weights that know its classes:

    python examples/compress_torchvision.py --images photos --weights resnet18.pth

Without a folder, scikit-learn's handwritten digits are taken, and the network is trained on them
first, from the weights that torchvision publishes:

    python examples/compress_torchvision.py --model squeezenet1_1
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import datasets, models, transforms

import sbf_dist

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # that published weights expect


def load_images(folder: Path | None, size: int, most: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return images (N, 3, size, size), normalised and shuffled, their labels, and the classes."""
    normalise = transforms.Normalize(MEAN, STD)
    generator = torch.Generator().manual_seed(0)
    if folder is None:
        digits = load_digits()
        grey = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        images = normalise(F.interpolate(grey, size=size, mode="bilinear").expand(-1, 3, -1, -1))
        order = torch.randperm(len(images), generator=generator)[:most]
        return images[order], torch.tensor(digits.target)[order], list("0123456789")
    view = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor(), normalise]
    )
    found = datasets.ImageFolder(str(folder), view)
    order = torch.randperm(len(found), generator=generator)[:most].tolist()
    images, labels = zip(*(found[number] for number in order), strict=True)
    return torch.stack(images), torch.tensor(labels), found.classes


def load_network(name: str, weights: Path | None, classes: int) -> nn.Module:
    """Build a network: with weights from a file, or else published ones but for the classifier."""
    network = models.get_model(name, num_classes=classes)
    if weights is not None:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        return network
    try:
        published = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
    except OSError as error:  # there is no way to torchvision's server
        print(f"published weights cannot be fetched ({error}): starting from RANDOM ones")
        return network
    own = network.state_dict()
    fitting = {key: value for key, value in published.items() if own[key].shape == value.shape}
    network.load_state_dict(own | fitting)
    return network


def train(network: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    parts = zip(images.split(64), labels.split(64), strict=True)
    right = sum((network(some).argmax(1) == wanted).sum().item() for some, wanted in parts)
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress a network of torchvision's.")
    parser.add_argument("--model", default="resnet18", help="its name in torchvision.models")
    parser.add_argument("--images", type=Path, help="folder with a folder for each class")
    parser.add_argument("--weights", type=Path, help="state dict (torch.save) for these classes")
    parser.add_argument("--size", type=int, help="side of the images, pixels")
    parser.add_argument("--most", type=int, default=1800, help="images that are read")
    parser.add_argument("--steps", type=int, default=150, help="of training, without --weights")
    parser.add_argument("--macs", type=float, default=0.6, help="share of multiply-adds to keep")
    parser.add_argument("--calibration", type=int, default=256, help="images for the compression")
    parser.add_argument("--keep", nargs="*", default=[], help="layers to leave dense: 'layer4.*'")
    parser.add_argument("--out", type=Path, help="folder for the student")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    size = arguments.size or (32 if arguments.images is None else 224)
    images, labels, classes = load_images(arguments.images, size, arguments.most)
    held_out = len(images) // 4
    network = load_network(arguments.model, arguments.weights, len(classes))
    if arguments.weights is None:
        train(network, images[held_out:], labels[held_out:], arguments.steps)
    network.eval()

    settings = sbf_dist.Compression(macs=arguments.macs, keep=arguments.keep)
    calibration = images[held_out:][: arguments.calibration]  # no labels
    student, plan = sbf_dist.compress(network, calibration, settings)
    print(plan.summary())

    shape = tuple(images.shape[1:])
    ms = sbf_dist.latencies([sbf_dist.optimize(one) for one in (network, student)], shape)
    print(f"{'network':<12} {'top-1 %':>8} {'M MACs':>8} {'ms':>8}")
    for name, one, macs, latency in (
        ("dense", network, plan.macs_before, ms[0]),
        ("compressed", student, plan.macs_after, ms[1]),
    ):
        top1 = accuracy(one, images[:held_out], labels[:held_out])
        print(f"{name:<12} {100 * top1:8.1f} {macs / 1e6:8.2f} {latency:8.3f}")
    if arguments.out is not None:
        sbf_dist.save(student, arguments.out, classes=classes, mean=MEAN, std=STD)
        print(f"student in {arguments.out}: sbf_dist.load({str(arguments.out)!r})")


if __name__ == "__main__":
    main()
