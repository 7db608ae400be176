"""SBF-Dist: CNNs whose pruned channels are rebuilt from the kept ones, distilled from teachers.

What is offered here is imported when it is first asked for, so that `import sbf_dist` is fast:

    student, plan = sbf_dist.compress(model, images, macs=0.5)
    sbf_dist.save(student, "folder")
    student = sbf_dist.load("folder", build=MyNet)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbf_dist.budget import Budget
    from sbf_dist.compression.convert import convert
    from sbf_dist.compression.cost import count
    from sbf_dist.compression.one_shot import compress
    from sbf_dist.compression.plan import Plan
    from sbf_dist.compression.planning.latency import latencies
    from sbf_dist.compression.planning.latency_table import LatencyTable, Timing
    from sbf_dist.compression.progressive import shrink
    from sbf_dist.distill.task import DistillationTask
    from sbf_dist.export.onnx import export_onnx
    from sbf_dist.export.optimize import optimize
    from sbf_dist.export.saved import load_student as load
    from sbf_dist.export.saved import save
    from sbf_dist.layers import SBFConv2d
    from sbf_dist.settings import Augmentation, Compression, Optimizer, PseudoLabels

__all__ = [
    "Augmentation",
    "Budget",
    "Compression",
    "DistillationTask",
    "LatencyTable",
    "Optimizer",
    "Plan",
    "PseudoLabels",
    "SBFConv2d",
    "Timing",
    "compress",
    "convert",
    "count",
    "export_onnx",
    "latencies",
    "load",
    "optimize",
    "save",
    "shrink",
]

# Where each name is defined, and as what if it is called otherwise there.
_HOMES = {
    "Augmentation": "sbf_dist.settings",
    "Budget": "sbf_dist.budget",
    "Compression": "sbf_dist.settings",
    "DistillationTask": "sbf_dist.distill.task",
    "LatencyTable": "sbf_dist.compression.planning.latency_table",
    "Optimizer": "sbf_dist.settings",
    "Plan": "sbf_dist.compression.plan",
    "PseudoLabels": "sbf_dist.settings",
    "SBFConv2d": "sbf_dist.layers",
    "Timing": "sbf_dist.compression.planning.latency_table",
    "compress": "sbf_dist.compression.one_shot",
    "convert": "sbf_dist.compression.convert",
    "count": "sbf_dist.compression.cost",
    "export_onnx": "sbf_dist.export.onnx",
    "latencies": "sbf_dist.compression.planning.latency",
    "load": "sbf_dist.export.saved:load_student",
    "optimize": "sbf_dist.export.optimize",
    "save": "sbf_dist.export.saved",
    "shrink": "sbf_dist.compression.progressive",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sbf_dist' has no attribute {name!r}")
    module, _, own_name = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(module), own_name or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
