"""What a network must be to be compressed, and why it cannot be where nothing can be converted."""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from sbf_dist.compression.dense_plan import NEVER_REACHED
from sbf_dist.errors import UserError
from sbf_dist.layers import SBFConv2d

LISTED = 5  # reasons in a refusal


def nothing_to_convert(model: nn.Module, name: str, reasons: Mapping[str, str]) -> UserError:
    """Return the error that lists, with counts, why no convolution can be converted."""
    found = Counter(reasons.values())
    unreached = sum(isinstance(module, nn.Conv2d) for module in model.modules()) - len(reasons)
    if unreached:
        found[NEVER_REACHED] = unreached
    return UserError(
        f"model {name!r} has no convolution that an SBF layer could replace; {with_counts(found)}"
    )


def with_counts(reasons: Counter[str]) -> str:
    """List reasons, the most frequent first, with the number of layers that have them."""
    listed = [f"{number} of them: {reason}" for reason, number in reasons.most_common(LISTED)]
    if len(reasons) > LISTED:
        listed.append(f"{len(reasons) - LISTED} other reasons")
    return "; ".join(listed)


def check_dense(model: nn.Module, name: str) -> None:
    """UserError that names an SBF layer, if there is one."""
    for layer, module in model.named_modules():
        if isinstance(module, SBFConv2d):
            raise UserError(
                f"model {name!r} has an SBF layer already ({layer}): sbf_dist.shrink makes it "
                "smaller"
            )
