"""How the images of a batch are shared out among the parts of a data set."""


def shares_of_batch(total: int, labelled: float, *, pairs: bool) -> dict[str, int]:
    """How many images of a batch of `total` come out of the parts "labelled" and "unlabelled".

    `labelled` is the wanted share. A part that is wanted at all has an image at least, as far as
    the batch has room; with `pairs`, where images are combined with their neighbours (mixup), both
    numbers are even if `total` is.
    """
    unit = 2 if pairs else 1
    least, most = unit * (labelled > 0), total - unit * (labelled < 1)
    count = max(min(unit * round(labelled * total / unit), most), least)
    count = min(count, total)
    return {"labelled": count, "unlabelled": total - count}
