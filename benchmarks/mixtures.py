"""Speed of layers whose channels are rebuilt from the whole basis (S = B, m = 1), in each form.

    python benchmarks/mixtures.py --json benchmarks/results/mixtures.json

Beside the dense convolution with its ReLU, in float32 and channels_last: as `sbf_conv2d` ("one
operator", which rebuilds within its tiles up to MAX_TILE_MULTIPLY_ADDS multiply-adds), as two
oneDNN convolutions ("two calls"), and as `optimize` chooses; and the layer of m = 3 with four
sources. Each keeps as many filters as a share of the dense layer's multiply-adds allows. Medians of
interleaved rounds; ratios above 1 are faster than dense. Narrow layers on small maps are
those of networks for CIFAR, the others those of ResNet-50.
"""

import argparse
import datetime
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import interleaved_medians, machine, pin_malloc
from torch import nn

from sbf_dist.export.fused import FusedConv2d, FusedSBFConv2d, FusedWholeBasis
from sbf_dist.layers import SBFConv2d

# inputs, outputs, kernel, side, batch
SHAPES = [
    (16, 16, 3, 20, 1),
    (16, 16, 3, 32, 8),
    (32, 32, 3, 10, 1),
    (32, 32, 3, 16, 8),
    (64, 64, 3, 5, 1),
    (64, 64, 3, 8, 8),
    (64, 64, 3, 56, 1),
    (64, 64, 3, 56, 8),
    (128, 128, 3, 28, 1),
    (128, 128, 3, 28, 8),
    (256, 256, 3, 14, 1),
    (256, 256, 3, 14, 8),
    (512, 512, 3, 7, 1),
    (512, 512, 3, 7, 8),
    (256, 64, 1, 56, 1),
    (64, 256, 1, 56, 8),
    (512, 128, 1, 28, 8),
    (128, 512, 1, 28, 8),
    (256, 1024, 1, 14, 8),
]
SHARES = (0.25, 0.5)  # of the dense layer's multiply-adds
FORMS = ("one operator", "two calls", "optimize", "m = 3, S = 4")


@torch.inference_mode()
def measure(shape: tuple[int, int, int, int, int], share: float, rounds: int) -> dict:
    """Time the forms of one layer at `share` of its multiply-adds."""
    inputs, outputs, kernel, side, batch = shape
    weights = inputs * kernel**2
    x = torch.randn(batch, inputs, side, side).contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    conv = conv.to(memory_format=torch.channels_last)

    def layer(sources: int, size: int) -> SBFConv2d:
        """Make the layer of most filters within the share."""
        most = max(
            kept
            for kept in range(1, outputs)
            if kept * weights + (outputs - kept) * min(kept, sources) * size**2
            <= share * outputs * weights
        )
        kept = list(range(most))
        return SBFConv2d.from_conv(conv, kept, [kept[:sources]] * (outputs - most), size)

    whole_basis = layer(outputs, 1)
    fused = FusedWholeBasis(whole_basis, "relu")
    in_tiles = FusedSBFConv2d(whole_basis, "relu")
    dense, four_sources = FusedConv2d(conv, "relu"), FusedSBFConv2d(layer(4, 3), "relu")
    calls = {
        "dense": lambda: dense(x),
        "one operator": lambda: in_tiles(x),
        "two calls": lambda: fused.product(fused.basis(x)),
        "optimize": lambda: fused(x),
        "m = 3, S = 4": lambda: four_sources(x),
    }
    ms = interleaved_medians(calls, rounds=rounds, repeats=10)
    return {
        "layer": f"{inputs}→{outputs}, {kernel} x {kernel}, {side} px",
        "batch": batch,
        "share": share,
        "kept": len(whole_basis.kept),
        "milliseconds": {name: round(value, 4) for name, value in ms.items()},
        "faster": {form: round(ms["dense"] / ms[form], 2) for form in FORMS},
    }


def main() -> None:
    """Measure all layers, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pin_malloc()
    table = Table("layer", "batch", "MACs", "kept", "dense ms", *FORMS)
    rows = []
    for shape in SHAPES:
        for share in SHARES:
            row = measure(shape, share, options.rounds)
            rows.append(row)
            table.add_row(
                row["layer"],
                str(row["batch"]),
                f"{share:g}",
                str(row["kept"]),
                f"{row['milliseconds']['dense']:.3f}",
                *(f"{row['faster'][form]:.2f}" for form in FORMS),
            )
    Console(width=120).print(table)
    if options.json:
        report = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "machine": machine(),
            "threads": options.threads,
            "torch": torch.__version__,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
