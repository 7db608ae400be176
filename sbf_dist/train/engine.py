"""The DeepSpeed engine around a task. With lean_deepspeed the only file that knows it."""

import functools
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from sbf_dist.errors import UserError
from sbf_dist.heads import head_of, is_within
from sbf_dist.settings import Optimizer
from sbf_dist.strided_convolutions import keep_inputs_contiguous
from sbf_dist.train import shards
from sbf_dist.train.average import WeightAverage
from sbf_dist.train.lean_deepspeed import load_deepspeed
from sbf_dist.train.loss_scale import (
    INITIAL_SCALE,
    LEAST_SCALE,
    STEPS_BETWEEN_DOUBLINGS,
    loss_scale,
)
from sbf_dist.train.resharding import names_of_groups, put, shared_names

_LARGEST_BUCKET = 500_000_000  # DeepSpeed's own, in numbers
_WITHOUT_NORM = {"compute_grad_norm": False}
# Methods of DeepSpeed's communication backend that its ZeRO stages call.
_EXCHANGES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
Precision = Literal["fp32", "bf16", "fp16"]


def parameter_groups(task: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """The trainable parameters of `task` as optimizer groups: those that decay and the rest.

    Weights of convolutions and linear layers decay. Not so parameters with fewer than two
    dimensions (biases, batch norm) nor parameters called "transforms" (the small kernels of an SBF
    layer, whose scale is tied to the fitted features and not to the size of the weights).

    Where the body learns more slowly than the head, that of task.student (of the task itself
    without one), its groups have an "lr_scale", which the loop multiplies learning rates with.
    """
    body, head = set(task.parameters()), set[nn.Parameter]()
    if settings.body_lr_share < 1:
        head = _parameters_of_head(getattr(task, "student", task))
        body -= head
    groups = []
    for members, share in ((body, settings.body_lr_share), (head, 1.0)):
        decayed: list[nn.Parameter] = []
        free: list[nn.Parameter] = []
        for name, parameter in task.named_parameters():
            if not parameter.requires_grad or parameter not in members:
                continue
            exempt = parameter.ndim < 2 or name.rpartition(".")[2] == "transforms"
            (free if exempt else decayed).append(parameter)
        scale = {"lr_scale": share} if share < 1 else {}
        for parameters, decay in ((decayed, settings.weight_decay), (free, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay} | scale)
    return groups


def _parameters_of_head(network: nn.Module) -> set[nn.Parameter]:
    names = head_of(network)
    if not names:
        raise UserError(
            "body_lr_share: the network has no linear layer or convolution that could be its head; "
            "must be 1"
        )
    return {p for name, p in network.named_parameters() if is_within(name, names)}


def build_engine(
    task: nn.Module,
    optimizer: Optimizer,
    *,
    micro_batch: int,
    accumulation: int = 1,
    zero_stage: int = 1,
    precision: Precision = "fp32",
    skip_bad_steps: int = 0,
    ema: float | None = None,
) -> Any:
    """The DeepSpeedEngine that trains `task` on the device where its parameters are.

    `micro_batch` is images per rank and backward pass, `accumulation` backward passes per step.
    The parameters and buffers of rank 0 are given to all ranks. A process group that is there
    (Ray Train's, say) is used; otherwise one is set up from torchrun's variables, or of this
    process alone. bf16 and fp16 are torch.autocast: weights, batch norm and the optimizer stay
    fp32. So many `skip_bad_steps` may be left out, see sbf_dist.train.finite. `ema`: decay of a
    moving average of the weights (engine.average, a WeightAverage); None: off.

    UserError: nothing to train; fp16 on the CPU; a ZeRO stage that does not exist, or that does not
    suit the optimizer.
    """
    devices = {parameter.device for parameter in task.parameters() if parameter.requires_grad}
    if not devices:
        raise UserError("task: has no parameter with requires_grad, so there is nothing to train")
    assert len(devices) == 1, f"the task's parameters are on several devices: {devices}"
    device = devices.pop()
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16: needs a GPU; use fp32 or bf16 on the CPU")
    if zero_stage not in (0, 1, 2, 3):
        raise UserError(f"zero_stage {zero_stage}: must be 0, 1, 2 or 3")
    if optimizer.name == "lamb" and zero_stage:
        raise UserError(
            f"zero_stage {zero_stage}: cannot be combined with lamb, which scales each layer's "
            "step as a whole; must be 0"
        )

    join_process_group(device)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed insists on it
    deepspeed = quiet_deepspeed(device)
    keep_inputs_contiguous(task)
    for buffer in task.buffers():  # DeepSpeed broadcasts the parameters, but no buffers
        dist.broadcast(buffer, src=0)
    reads_norm = optimizer.clip is not None or skip_bad_steps > 0
    numbers = sum(p.numel() for p in task.parameters() if p.requires_grad)
    with torch.device(device):
        engine, *_ = deepspeed.initialize(
            model=task,
            optimizer=torch_optimizer(task, optimizer),
            config=_config(optimizer, micro_batch, accumulation, precision)
            | {"zero_optimization": _zero(zero_stage, numbers, reads_norm=reads_norm)},
            dist_init_required=False,
        )
    engine.scales_losses = precision == "fp16"
    set_loss_scale(engine)
    engine.average = WeightAverage(engine, ema) if ema is not None else None
    engine.skip_bad_steps = skip_bad_steps
    engine.timed_communication = timed_communication
    engine.reads = {}  # the values of a recipe that the training depends on, for its checkpoints
    engine.checkpoint_engine = _restricted_checkpoint_engine()
    return engine


def set_loss_scale(engine: Any) -> None:
    """Let ZeRO stages 1 to 3 scale losses at fp16 as DeepSpeed does for networks in half.

    Under torch_autocast DeepSpeed gives them a GradScaler: it clips gradients before they are
    unscaled, so that nothing is learned; looks for overflows per rank and group of parameters, so
    that some step and others do not; and gives one to an fp32 training that follows an fp16
    training in the same process. At stage 0 its GradScaler is used as it should be.
    """
    if engine.zero_optimization_stage() == 0:
        return
    zero = engine.optimizer
    zero.torch_autocast_gradscaler = None
    if engine.scales_losses:
        scaler = importlib.import_module("deepspeed.runtime.fp16.loss_scaler").DynamicLossScaler(
            init_scale=INITIAL_SCALE,
            scale_window=STEPS_BETWEEN_DOUBLINGS,
            min_scale=LEAST_SCALE / 2,  # finite.LossWatch ends the training there
            delayed_shift=1,
            consecutive_hysteresis=False,
            raise_error_at_min_scale=False,
        )
        zero.loss_scaler, zero.dynamic_loss_scale = scaler, True
        zero.check_grad_overflow = True  # stages 1 and 2; stage 3 looks at the gradient's norm


@contextmanager
def timed_communication(part: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """While the context lasts, let what engines exchange between ranks happen within part().

    What ZeRO 3 starts in the background is timed where it is started, not where it is waited for.
    """
    backend = importlib.import_module("deepspeed.comm.comm").cdb
    timed: list[str] = []
    for name in _EXCHANGES:
        setattr(backend, name, _within(part, getattr(backend, name)))
        timed.append(name)
    try:
        yield
    finally:
        for name in timed:
            delattr(backend, name)  # the method of the class is there again


def _within(part: Callable[[], AbstractContextManager[None]], call: Any) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*arguments: Any, **keywords: Any) -> Any:
        with part():
            return call(*arguments, **keywords)

    return timed


def join_process_group(device: torch.device) -> None:
    """Make sure that torch.distributed is ready: gloo for CPU tensors, nccl for CUDA tensors."""
    if dist.is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def torch_optimizer(task: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of the trainable parameters of `task`."""
    groups = parameter_groups(task, settings)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    if settings.name == "lamb":
        from timm.optim import Lamb  # takes seconds

        # The gradient is clipped before, as it is for the other optimizers.
        return Lamb(groups, lr=settings.lr, betas=settings.betas, max_grad_norm=None)
    return torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0
    )


def _config(
    optimizer: Optimizer,
    micro_batch: int,
    accumulation: int,
    precision: Precision,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip or 0.0,
        "zero_allow_untested_optimizer": True,  # SGD
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
    }
    if precision != "fp32":
        # DeepSpeed's own bf16 and fp16 modes cast the whole module, and batch norm on the CPU
        # refuses inputs and statistics of different types.
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
        config["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return config


def _zero(stage: int, parameters: int, *, reads_norm: bool) -> dict[str, Any]:
    """DeepSpeed's settings of a ZeRO stage, for a task of so many trained numbers.

    It would read the norm of the gradient from the device in each step, needed or not; at stage 3
    that cannot be turned off. A norm that is not finite makes it leave out the step.
    """
    # It would set aside 2 GB for gradients on their way to other ranks, however small the network.
    settings = {"stage": stage, "reduce_bucket_size": min(_LARGEST_BUCKET, parameters)}
    return settings | ({} if reads_norm or stage not in (1, 2) else _WITHOUT_NORM)


def quiet_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed, and silence its messages that do not concern the user."""
    os.environ["DS_ACCELERATOR"] = device.type
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    log.addFilter(_is_for_users)
    # One for every collective of ZeRO 3: DeepSpeed calls functions by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    return load_deepspeed(device.type)


def _is_for_users(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()  # ZeRO with SGD: our tests train with it


def _restricted_checkpoint_engine() -> Any:
    """DeepSpeed's reader and writer of .pt files, which unpickles nothing but what it wrote.

    DeepSpeed calls torch.load with weights_only=False, which runs whatever a file asks for.
    """
    torch_engine = importlib.import_module(
        "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine"
    )
    modules = (
        importlib.import_module("deepspeed.runtime.fp16.loss_scaler"),
        importlib.import_module("deepspeed.runtime.zero.config"),
        importlib.import_module("deepspeed.utils.tensor_fragment"),
    )
    types = {
        f"{module.__name__}.{name}": value
        for module in modules
        for name, value in vars(module).items()
    }
    allowed = [types[name] for name in shards.OF_DEEPSPEED]

    class RestrictedCheckpointEngine(torch_engine.TorchCheckpointEngine):  # type: ignore[name-defined]
        def save(self, state_dict: dict[str, Any], path: str) -> None:
            torch.save(state_dict, path)

        def load(self, path: str, map_location: Any = None) -> Any:
            return shards.load_restricted(path, map_location, allowed)

    return RestrictedCheckpointEngine()


def save_shards(engine: Any, folder: Path, tag: str) -> None:
    """Write this rank's shards below folder/tag; every rank calls it with the same tag."""
    scale = loss_scale(engine)
    added: dict[str, Any] = {
        shards.NAMES: names_of_groups(engine),
        shards.SHARED: shared_names(engine),
    }
    if scale is not None:
        added[shards.SCALER] = scale.state_dict()
    if engine.average is not None:
        added[shards.EMA_BUFFERS] = engine.average.buffers
    engine.save_checkpoint(str(folder), tag=tag, client_state=added, save_latest=False)
    # DeepSpeed puts scripts of its own beside the shards; a checkpoint should hold no code.
    for script in folder.glob("*.py"):
        script.unlink()


def load_shards(engine: Any, folder: Path, tag: str, *, ranks: int) -> None:
    """Read the weights and the optimizer's state that save_shards wrote on `ranks` ranks.

    On another number of ranks they are divided anew: DeepSpeed refuses to, and its way round that
    ("universal checkpoints") does not know SGD's momentum.
    """
    if ranks != dist.get_world_size() and engine.zero_optimization_stage() > 0:
        whole = shards.read(folder / tag, ranks)
        put(engine, whole)
        saved_scale, averaged = whole.scaler, whole.ema_buffers
    else:
        path, added = engine.load_checkpoint(str(folder), tag=tag)
        if path is None:  # DeepSpeed only warns
            raise UserError(f"checkpoint {folder / tag}: DeepSpeed finds nothing to load there")
        saved_scale, averaged = added.get(shards.SCALER), added.get(shards.EMA_BUFFERS, {})
        set_loss_scale(engine)  # DeepSpeed has put the saved one in its place
    scale = loss_scale(engine)
    if scale is not None and saved_scale is not None:
        scale.load_state_dict(saved_scale)
    if engine.average is not None:
        engine.average.buffers = {n: value.to(engine.device) for n, value in averaged.items()}
