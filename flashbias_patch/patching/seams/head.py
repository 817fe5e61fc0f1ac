"""The seams of a head: query geometry for the transformer, and a place among the losses."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import nn

from ... import aqr
from ...aqr.geometry import take_geometry
from ...aqr.router import AdaptiveQueryRouter
from ...attention.recovery import replay
from .base import Args, Kwargs, Seam
from .pending_losses import of_output, pending, take, tensors_of
from .transformer_constructor import KEY


class HeadSeam(Seam):
    """forward of a head: its outputs keep their supervision; geometry and supervision of an aborted
    call are forgotten."""

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Args, kwargs: Kwargs) -> Any:
        router = router_of(module)
        if router is None or replay.recomputing():
            return wrapped(*args, **kwargs)
        take_geometry()
        if not router.supervision:
            return wrapped(*args, **kwargs)
        # Outputs that were freed cannot reach a loss any more.
        awaited = {id(loss) for loss in of_output.values()}
        earlier = [loss for loss in pending.pop(router, ()) if id(loss) in awaited]
        outputs = wrapped(*args, **kwargs)
        own = pending.get(router, [])
        if len(own) > 1:  # a transformer that is called for each of several levels
            own = [torch.stack(own).mean()]
        pending[router] = earlier + own
        for tensor in tensors_of(outputs):
            of_output[tensor] = own[0] if own else None
        return outputs


class QueryEmbedSeam(Seam):
    """query_embed(ref_points, img_metas) of a CMT head: where the queries are, for the transformer
    called next."""

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Args, kwargs: Kwargs) -> Any:
        router = router_of(module)
        if router is not None and router.needs_places:
            given = dict(zip(("ref_points", "img_metas"), args), **kwargs)
            points, metas = given["ref_points"], given["img_metas"]
            matrices = shape = None
            if all("lidar2img" in meta for meta in metas):
                matrices = torch.stack(
                    [
                        torch.stack(
                            [torch.as_tensor(m, dtype=torch.float32) for m in meta["lidar2img"]]
                        )
                        for meta in metas
                    ]
                )
                shape = metas[0]["pad_shape"][0][:2]
            aqr.provide_geometry(points, module.pc_range, matrices, shape)
        return wrapped(*args, **kwargs)


class LossSeam(Seam):
    """loss(...) of a head -> dict: with aqr.supervision, `loss_aqr` beside the others."""

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Args, kwargs: Kwargs) -> Any:
        losses = wrapped(*args, **kwargs)
        router = router_of(module)
        if (
            router is not None
            and pending.get(router)
            and isinstance(losses, dict)
            and "loss_aqr" not in losses
        ):
            supervision = take(pending[router], (args, kwargs))
            if supervision is not None:
                losses["loss_aqr"] = router.supervision * supervision
        return losses


def router_of(head: nn.Module) -> Optional[AdaptiveQueryRouter]:
    """The router of a head's transformer, if it has one; also where the transformer is wrapped
    (CheckpointWrapper, FSDP)."""
    module = head._modules.get("transformer")
    while module is not None:
        router = module._modules.get(KEY)
        if isinstance(router, AdaptiveQueryRouter):
            return router
        children = list(module._modules.values())
        module = children[0] if len(children) == 1 else None
    return None
