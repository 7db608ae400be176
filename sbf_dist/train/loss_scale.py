"""What losses are multiplied with at fp16, so that small gradients do not become zero.

Micikevicius et al. 2018, arXiv 1710.03740, section 3.2. A step whose gradient overflows is left out
and halves the scale; STEPS_BETWEEN_DOUBLINGS steps without one double it.
"""

from typing import Any, Protocol

INITIAL_SCALE = 2.0**16
STEPS_BETWEEN_DOUBLINGS = 2000  # as torch.amp.GradScaler's
# Gradients that overflow at a lower one are infinite or NaN whatever the scale.
LEAST_SCALE = 1.0


class Scale(Protocol):
    """What is asked of a torch.amp.GradScaler."""

    def get_scale(self) -> float: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class ScaleOfZero:
    """The scale of an optimizer of ZeRO stage 1, 2 or 3."""

    def __init__(self, zero: Any) -> None:
        self._scaler = zero.loss_scaler  # DeepSpeed's DynamicLossScaler

    def get_scale(self) -> float:
        """Return what the next loss is multiplied with."""
        return self._scaler.cur_scale

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and since when it has been as large."""
        scaler = self._scaler
        return {
            "scale": scaler.cur_scale,
            "steps": scaler.cur_iter,
            "last_overflow": scaler.last_overflow_iter,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a scale; versions before saved that of a GradScaler, without steps."""
        self._scaler.cur_scale = state_dict["scale"]
        self._scaler.cur_iter = state_dict.get("steps", 0)
        self._scaler.last_overflow_iter = state_dict.get("last_overflow", -1)


def loss_scale(engine: Any) -> Scale | None:
    """Return the scale of an engine at fp16; None at other precisions."""
    undivided = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if undivided is not None:
        return undivided
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return ScaleOfZero(engine.optimizer) if getattr(scaler, "dynamic", False) else None
