"""The figures of a step's line: losses, gradients and parameters, or outputs of a forward pass."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

from . import capture, inference, iterations
from .cuda import Place

# The relative change of a nudged run's parameters: a few units in the last place.
NUDGE_SIZES = {"float32": 2.0**-20, "half": 2.0**-10}


class Figures:
    """Figures of one step: numbers are put into `line`; tensors on a device are kept in `tensors`,
    with their `places`, to be copied without waiting for the device."""

    def __init__(self, line: Dict[str, Any]) -> None:
        self.line = line
        self.places: List[Place] = []
        self.tensors: List[Any] = []

    def put(self, section: str, key: Optional[str], value: Any) -> None:
        """Add a number, a tensor of one element, or None."""
        if value is not None and not isinstance(value, (int, float)) and value.device.type == "cpu":
            # to send it to the GPU and back would make the step wait
            value = float(value.detach())
        if value is None or isinstance(value, (int, float)):
            if key is None:
                self.line[section] = value
            else:
                self.line.setdefault(section, {})[key] = value
        else:
            self.places.append(Place(section, key))
            self.tensors.append(value)

    def put_training(
        self,
        torch: Any,
        inbox: capture.Inbox,
        gpu: Any,
        ended: iterations.Ended,
        parameters: Dict[str, Any],
    ) -> None:
        """Add the losses, the norm of the gradients and the watched parameters."""
        losses = inbox.losses
        if losses:
            self.put("loss", None, losses[0] if len(losses) == 1 else gpu.stack(losses).sum())
        for name, value in inbox.parts.items():
            self.put("loss_parts", name, value)
        norm = None if hasattr(inbox.clip_norm, "to_local") else inbox.clip_norm
        if norm is None:
            norm = ended.norm(torch)
        self.put("grad_norm", None, norm)
        for name, parameter in parameters.items():
            self._put_parameter(name, parameter)

    def _put_parameter(self, name: str, parameter: Any) -> None:
        value = capture.local(parameter.detach())
        if not value.numel():
            return  # another rank holds it
        if value.numel() == 1:
            self.put("params", name, value)
        elif value.numel() <= 8:
            for i, entry in enumerate(value.reshape(-1)):
                self.put("params", f"{name}[{i}]", entry)
        else:
            self.put("params", f"|{name}|", value.float().norm())
        gradient = parameter.grad
        self.put(
            "param_grads",
            name,
            None if gradient is None else capture.local(gradient.detach()).float().norm(),
        )


def put_outputs(line: Dict[str, Any], torch: Any, sketch: Any, output: Any) -> None:
    """Add one number for each tensor of a forward pass's output, and their sum."""
    with torch.no_grad():
        tensors = inference.tensors_of(torch, output)
        values = [float(sketch(tensor)) for _, tensor in tensors]
    line["outputs"] = {name: value for (name, _), value in zip(tensors, values)}
    if values:
        line["output"] = sum(values)
