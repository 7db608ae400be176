"""`sbf data`: sets of images from their archives, checked and divided."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launchers.display import Display
from launchers.places import check_writable
from sbf_dist.errors import UserError
from sbf_dist.schema import MAX_SEED

app = typer.Typer(
    help="Prepare CIFAR-10, CIFAR-100, Tiny-ImageNet and ILSVRC-2012 from their archives.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_MAX_LISTED = 100  # files of a kind


class SetName(StrEnum):
    """The sets that can be prepared."""

    CIFAR10 = "cifar10"
    CIFAR100 = "cifar100"
    TINY_IMAGENET = "tiny-imagenet"
    IMAGENET = "imagenet"


class Layout(StrEnum):
    """The file layout of a prepared set."""

    FOLDER = "folder"
    WEBDATASET = "webdataset"


Folder = Annotated[
    str,
    typer.Argument(
        metavar="DIR", help="A prepared set, or class folders; or a set's s3://BUCKET/FOLDER."
    ),
]


@app.command(short_help="Turn a set's archives into class folders or WebDataset shards.")
def prepare(
    name: Annotated[SetName, typer.Argument(metavar="SET", help="The set.")],
    archives: Annotated[Path, typer.Option(help="Folder that holds the archives as published.")],
    out: Annotated[
        str,
        typer.Option(
            help="Folder for the prepared set; or s3://BUCKET/FOLDER (gs://, abfs://), for tar "
            "files."
        ),
    ],
    layout: Annotated[
        Layout, typer.Option("--format", help="Class folders, or tar files for object storage.")
    ] = Layout.FOLDER,
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, help="Random seed of the order of samples in tar files."),
    ] = 0,
    no_checksum: Annotated[
        bool, typer.Option("--no-checksum", help="Accept archives whose MD5 sum differs.")
    ] = False,
) -> None:
    """Prepare a data set from its archives. Nothing is downloaded.

    Run the same command again to resume. A finished set is left unchanged.

    \b
    cifar10        cifar-10-python.tar.gz or cifar-10-binary.tar.gz
    cifar100       cifar-100-python.tar.gz or cifar-100-binary.tar.gz
    tiny-imagenet  tiny-imagenet-200.zip
    imagenet       ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar
                   and ILSVRC2012_devkit_t12.tar.gz

    \b
    For example:
    sbf data prepare cifar10 --archives downloads --out data/cifar10
    """
    from pipelines.roots import root_of

    place = root_of(out)
    if isinstance(place, Path):
        check_writable("--out", place)
    from pipelines.sources.manifest import is_prepared
    from pipelines.sources.preparation import prepare as prepare_set

    before = is_prepared(place)
    with Display() as display:
        manifest = prepare_set(
            name.value,
            archives,
            out,
            layout=layout.value,
            seed=seed,
            checksum=not no_checksum,
            progress=_Progress(display),
        )
        counts = manifest.counts
        display.say(
            f"{out}: {manifest.set}, {len(manifest.classes)} classes, {counts['train']:,} images "
            f"in train, {counts['val']:,} in val" + ("; prepared before" if before else "")
        )


@app.command(short_help="Verify a prepared set against its manifest.")
def check(folder: Folder) -> None:
    """Read every file of a prepared set and list missing, changed and unexpected files."""
    from pipelines.sources.verification import check as check_set

    with Display() as display:
        findings = check_set(folder, _Progress(display))
        for kind, names in findings.kinds().items():
            for file in names[:_MAX_LISTED]:
                display.say(f"{kind}  {file}")
            if len(names) > _MAX_LISTED:
                display.say(f"{kind}  … and {len(names) - _MAX_LISTED:,} more")
        if findings.whole:
            display.say(f"{folder}: {findings.files:,} files are unchanged")
    if not findings.whole:
        by_kind = ", ".join(
            f"{len(names):,} {kind}" for kind, names in findings.kinds().items() if names
        )
        raise UserError(
            f"data {folder}: {by_kind} of {findings.files:,} files; remove the folder and "
            "prepare the set again"
        )


@app.command(short_help="Choose the labelled images.")
def split(
    folder: Folder,
    labelled: Annotated[
        str, typer.Option(metavar="N|SHARE", help="Images per class (10), or a share (0.1).")
    ],
    out: Annotated[Path, typer.Option(help="Output file, for data.split in a recipe.")],
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")] = 0,
) -> None:
    """Write a list of labelled training images, drawn per class; the others are unlabelled.

    With the same seed, a smaller number gives a subset of a larger one.
    """
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file for the list")
    check_writable("--out", out.absolute().parent)
    import numpy as np

    from pipelines.roots import root_of
    from pipelines.sources.listing import list_images
    from pipelines.splits import by_class, pick_labelled, write_split

    place = root_of(folder)
    listing = list_images(place)
    train = by_class(place, listing.classes, listing.labels, np.array(listing.roles))
    picked = np.sort(
        np.concatenate(
            pick_labelled(place, listing.classes, train, _number_or_share(labelled), seed)
        )
    )
    heading = f"labelled images: {labelled} per class, seed {seed}"
    write_split(out, (listing.files[row] for row in picked), heading)
    Display().say(
        f"{out}: {len(picked):,} of {sum(map(len, train)):,} training images, "
        f"{len(listing.classes)} classes"
    )


def _number_or_share(text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise UserError(
            f"labelled {text!r}: must be a number of images per class, or a share between 0 and 1"
        ) from None


class _Progress:
    """Shows progress with its rate and the time that is left."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._title, self._first, self._start = "", 0, 0.0

    def __call__(self, title: str, done: int, of: int, unit: str) -> None:
        now = time.monotonic()
        if title != self._title:
            self._title, self._first, self._start = title, done, now
        record = {"title": title, "step": done, "steps": of}
        if now > self._start and done > self._first:
            rate = (done - self._first) / (now - self._start)
            record |= {"rate": f"{rate:,.0f} {unit}/s", "seconds_left": (of - done) / rate}
        self._display.show(record)
