"""Which convolutions of a network can become SBF layers, and why the others cannot."""

from torch import Tensor, nn

from sbf_dist.errors import UserError

LARGEST_GRAM = 4608  # shifted channels in a layer's Gram matrix: 512 channels with m = 3


def forward_order(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the convolutions of `model` in the order in which a forward pass reaches them."""
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    model(images[:2])
    for handle in handles:
        handle.remove()
    repeated = sorted({name for name in order if order.count(name) > 1})
    if repeated:
        raise UserError(
            f"layer {repeated[0]} is used {order.count(repeated[0])} times in a forward pass; "
            "an SBF layer must be used once"
        )
    return order


def find_candidates(
    model: nn.Module, images: Tensor, transform_size: int
) -> tuple[dict[str, str], list[str]]:
    """Split the convolutions into those left dense, with the reason, and those to convert."""
    reasons: dict[str, str] = {}
    candidates: list[str] = []
    for name in forward_order(model, images):
        conv = convolution(model, name)
        filter_cost = conv.weight[0].numel()
        size = size_for(conv, transform_size)
        if type(conv) is not nn.Conv2d:
            reasons[name] = f"{type(conv).__name__} is not a plain convolution"
        elif conv.groups > 1:
            reasons[name] = f"grouped convolution ({conv.groups} groups)"
        elif conv.in_channels == images.shape[1]:
            reasons[name] = "the stem: it reads the image itself"
        elif filter_cost <= size**2:
            reasons[name] = (
                f"a filter costs {filter_cost} multiply-adds, rebuilding a channel at least "
                f"{size**2}"
            )
        else:
            candidates.append(name)
    return reasons, candidates


def convolution(model: nn.Module, name: str) -> nn.Conv2d:
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return conv


def size_for(conv: nn.Conv2d, transform_size: int) -> int:
    """Return the transformations' size in a layer: 1 where the layer is too wide to fit more."""
    return transform_size if conv.out_channels * transform_size**2 <= LARGEST_GRAM else 1


def filter_macs(conv: nn.Conv2d, layer_macs: int) -> tuple[float, float]:
    """Multiply-adds of one filter, and of one tap of a transformation, over the whole output."""
    per_filter = layer_macs / conv.out_channels
    return per_filter, per_filter / conv.weight[0].numel()
