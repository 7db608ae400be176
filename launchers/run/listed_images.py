"""A recipe's images as they are listed, before one is read: without PyTorch and DALI."""

from pipelines.sources.folder import check_folder
from sbf_dist.recipe import Data


def check_images(data: Data, seed: int) -> int:
    """Refuse mistakes of layout and number, without reading an image; the number of classes."""
    assert data.root is not None
    return check_folder(
        data.root,
        labelled_per_class=data.labelled_per_class,
        validation=data.validation,
        seed=seed,
        split=data.split,
        unlabelled=data.unlabelled,
        expected=data.expected,
    )
