"""The probe's view of the GPU: events, memory, and figures that travel to the host without anybody
waiting."""

from __future__ import annotations

import hashlib
from typing import Any, Dict, List, NamedTuple, Optional


class Place(NamedTuple):
    """Where a step's line holds a figure: line[section], or line[section][key]."""

    section: str
    key: Optional[str] = None


class Gpu:
    """The GPU that an optimiser works on; every answer is empty where torch has not begun to use
    one."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.device: Any = None  # None: the current one
        self.last: Any = None  # event at the end of the last recording

    def follow(self, optimizer: Any) -> None:
        """Look where that optimiser's parameters are, which need not be the current device."""
        devices = (p.device for group in optimizer.param_groups for p in group["params"])
        self.device = next((device for device in devices if device.type == "cuda"), None)
        self.last = None

    def used(self) -> bool:
        return bool(self.torch.cuda.is_available() and self.torch.cuda.is_initialized())

    def capturing(self) -> bool:
        """Is a CUDA graph being captured? A capture computes nothing, and must not be disturbed."""
        ask = getattr(
            self.torch.cuda, "is_current_stream_capturing", None
        )  # torch 1.9 has no graphs
        return ask is not None and self.used() and bool(ask())

    def event(self) -> Any:
        """A CUDA event, recorded now; None without a GPU."""
        if not self.used():
            return None
        event = self.torch.cuda.Event(enable_timing=True)
        event.record(self.torch.cuda.current_stream(self.device))
        return event

    def send(
        self, line: Dict[str, Any], places: List[Place], values: List[Any], begun: Any
    ) -> Pending:
        """`values` (0-d tensors) on their way to their `places` in `line`. `begun`: see Pending."""
        vector = self.stack(values) if values else None
        if begun is None:
            return Pending(line, places, vector)
        if vector is not None and vector.device.type == "cuda":
            host = self.torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            vector = host.copy_(vector, non_blocking=True)
        before, self.last = self.last, self.event()
        return Pending(line, places, vector, before, begun, self.last)

    def stack(self, values: List[Any]) -> Any:
        """0-d tensors of any device and type as one vector, where the most of the work is."""
        home = next((v.device for v in values if v.device.type != "cpu"), values[0].device)
        kind = self.torch.float32 if home.type == "mps" else self.torch.float64
        return self.torch.stack([v.detach().reshape(()).to(home, kind) for v in values])

    def memory(self) -> Dict[str, int]:
        """Bytes. Peaks are read and never reset: the command's own peak figures must stay as they
        are."""
        stats = (
            self.torch.cuda.memory.memory_stats_as_nested_dict(self.device) if self.used() else None
        )
        if not stats:
            return {}
        return {
            "cuda": stats["allocated_bytes"]["all"]["current"],
            "cuda_peak": stats["allocated_bytes"]["all"]["peak"],
            "cuda_reserved_peak": stats["reserved_bytes"]["all"]["peak"],
        }

    def random_state(self) -> str:
        """A digest of where torch's generators stand: it tells whether two runs have drawn alike so
        far."""
        digest = hashlib.blake2b(bytes(self.torch.get_rng_state().tolist()), digest_size=8)
        if self.used():
            digest.update(bytes(self.torch.cuda.get_rng_state(self.device or "cuda").tolist()))
        return digest.hexdigest()

    def redraw(self, times: int = 1) -> None:
        """`times` draws from each of torch's generators: all that is drawn from now on differs."""
        for _ in range(times):
            self.torch.rand(1)
            if self.used():
                self.torch.rand(1, device=self.device or "cuda")

    def redraw_in_step(self, times: int = 1) -> None:
        """Now, and once more when the next step calls its first module: many commands seed at the
        top of a step."""

        def first(*call: Any) -> None:
            handle.remove()
            self.redraw(times)

        self.redraw(times)
        handle = self.torch.nn.modules.module.register_module_forward_pre_hook(first)

    def environment(self) -> Dict[str, Any]:
        if not self.used():
            return {}
        return {
            "gpu": self.torch.cuda.get_device_name(self.device),
            "cudnn": self.torch.backends.cudnn.version(),
        }


class Pending:
    """A step's line whose numbers are still on their way from the device.

    `before`, `begun`, `ready`: CUDA events at the end of the last recording, and at the beginning
    and the end of this one; None without a GPU.
    """

    def __init__(
        self,
        line: Dict[str, Any],
        places: List[Place],
        values: Any,
        before: Any = None,
        begun: Any = None,
        ready: Any = None,
    ) -> None:
        self.line, self.places, self.values = line, places, values
        self.before, self.begun, self.ready = before, begun, ready

    def arrived(self) -> bool:
        return self.ready is None or bool(self.ready.query())

    def complete(self) -> Dict[str, Any]:
        if self.ready is not None:
            self.ready.synchronize()
            if self.before is not None:
                self.line["cuda_s"] = self.before.elapsed_time(self.begun) / 1e3
        for (section, key), value in zip(
            self.places, [] if self.values is None else self.values.tolist()
        ):
            if key is None:
                self.line[section] = value
            else:
                self.line.setdefault(section, {})[key] = value
        return self.line
