"""Adaptive query routing on mini_cmt: loss, time, memory and bias_scale, patched against a dense
bias in plain PyTorch.

    python benchmarks/aqr.py --frame DIR [--out benchmarks/results/aqr_cpu.json] [--pictures
    docs/images] python benchmarks/aqr.py --table benchmarks/results/aqr_cpu.json docs/aqr.md   #
    its figures into the page

Each case is a process of its own that trains mini_cmt on one frame. In "unpatched" ones
flashbias_patch is not installed and the bias, where there is one, is a dense mask (B*H, M, N) made
by the formula in plain PyTorch. Time is CPU time a step (one thread), so that another process on
the machine does not show; memory is the process' peak.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

ROOT = Path(__file__).resolve().parents[1]
SEGMENTS = 2  # lidar, cameras
SIZES = {
    "bev": 24,
    "image_size": (192, 96),
    "queries": 100,
    "layers": 2,
    "embed_dims": 128,
    "dn_groups": 1,
}
ON = {"enable": True}
CASES: Dict[str, Dict[str, Any]] = {
    "off, unpatched": {"patched": False},
    "off, patched": {"patched": True},
    "on, unpatched, dense bias": {"patched": False, "aqr": ON},
    "on, patched": {"patched": True, "aqr": ON},
    "on, patched, checkpointed": {"patched": True, "aqr": ON, "with_cp": True},
    "sensor drop, off": {"patched": True, "drop": 0.5},
    "sensor drop, on": {"patched": True, "aqr": ON, "drop": 0.5},
    "sensor drop, on, supervised": {
        "patched": True,
        "aqr": {**ON, "drop": 0.5, "supervision": 1.0},
    },
}
CHECKED_STEPS = (1, 50, 200)  # where the gradient is compared with the dense reference in float64


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--frame",
        metavar="DIR",
        help="a nuScenes frame in mmdet3d's info format (default: synthetic)",
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--out", metavar="FILE.json", help="where the results go; default: printed only"
    )
    parser.add_argument(
        "--pictures", metavar="DIR", help="draw the router's weights and bias_scale there"
    )
    parser.add_argument(
        "--table",
        nargs=2,
        metavar=("FILE.json", "PAGE.md"),
        help="write the tables into a page, stop",
    )
    parser.add_argument("--case", choices=sorted(CASES), help=argparse.SUPPRESS)  # in the child
    args = parser.parse_args(argv)
    if args.case:
        run_case(args)
        return
    if args.table:
        page = Path(args.table[1])
        page.write_text(with_tables(page.read_text(), json.loads(Path(args.table[0]).read_text())))
        return
    results: Dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            target = os.path.join(folder, "case.json")
            environment = {
                **os.environ,
                "FLASHBIAS_PATCH": "1" if case["patched"] else "0",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }
            command = [
                sys.executable,
                __file__,
                "--case",
                name,
                "--steps",
                str(args.steps),
                "--out",
                target,
            ]
            command += ["--frame", args.frame] if args.frame else []
            subprocess.run(command, check=True, env=environment)
            with open(target) as file:
                results[name] = json.load(file)
            print(line_of(name, results[name]), flush=True)
    seen = results["on, patched"].pop("seen")
    report = {
        "machine": results["on, patched"].pop("machine"),
        "steps": args.steps,
        "sizes": SIZES,
        "frame": "nuScenes" if args.frame else "synthetic",
        "cases": results,
    }
    for case in results.values():
        case.pop("machine", None)
        case.pop("seen", None)
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    if args.pictures:
        draw(Path(args.pictures), seen, report, args.frame)


def line_of(name: str, case: Dict[str, Any]) -> str:
    words = [
        f"{name:<28} loss {case['last_loss']:.3f}",
        f"{case['cpu_ms']:.0f} ms",
        f"{case['peak_mib']} MiB",
    ]
    if case.get("bias_scale"):
        words.append(f"bias_scale {case['bias_scale'][0]:.4f} -> {case['bias_scale'][-1]:.4f}")
    if case.get("gradient"):
        words.append(
            "gradient error "
            + " ".join(f"{item['relative_error']:.1e}" for item in case["gradient"])
        )
    return "  ".join(words)


# -- tables ----------------------------------------------------------------------------------------

BEGIN, END = "<!-- figures: benchmarks/aqr.py --table -->", "<!-- end of figures -->"


def with_tables(page: str, report: Dict[str, Any]) -> str:
    """The page with everything between its two markers made anew from the results."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + "\n" + tables(report) + "\n" + END + rest.partition(END)[2]


def tables(report: Dict[str, Any]) -> str:
    sizes, machine = report["sizes"], report["machine"]
    lines = [
        f"{report['steps']} steps of mini_cmt on the {report['frame']} frame ({sizes['queries']} "
        "queries and "
        f"denoising, {sizes['layers']} layers, width {sizes['embed_dims']}); loss: mean of the "
        "last 20 steps; "
        f"time: CPU time a step, median; memory: the process' peak. torch {machine['torch']}, "
        "one thread of "
        f"{machine['processor']}.",
        "",
        "| AQR | loss | ms a step | MiB | bias_scale, first and last | gradient's error against "
        "dense float64 |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in report["cases"].items():
        if name.startswith("sensor"):
            continue
        scale = (
            "{:.3f}, {:.3f}".format(case["bias_scale"][0], case["bias_scale"][-1])
            if case["bias_scale"]
            else ""
        )
        errors = ", ".join(
            f"{g['relative_error']:.0e} (step {g['step']})" for g in case["gradient"]
        )
        lines.append(
            f"| {name} | {case['last_loss']:.3f} | {case['cpu_ms']:.0f} | {case['peak_mib']} | "
            f"{scale} "
            f"| {errors} |"
        )
    lines += [
        "",
        "Trained with a sensor zeroed in half of the steps, then measured with each one zeroed "
        "in turn; w: "
        "mean weight on the lidar.",
        "",
        "| AQR | loss, both | without lidar | without cameras | w, both "
        "| w, without lidar | w, without cameras |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in report["cases"].items():
        if name.startswith("sensor"):
            found = [case["dropped"][key] for key in ("none", "lidar", "camera")]
            cells = [f"{item['loss']:.3f}" for item in found]
            cells += [
                "" if item["lidar_weight"] is None else f"{item['lidar_weight']:.3f}"
                for item in found
            ]
            lines.append(f"| {name[len('sensor drop, ') :]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# -- one case, in a process of its own -------------------------------------------------------------


def run_case(args: argparse.Namespace) -> None:
    case = CASES[args.case]
    import flashbias_patch

    sys.path[:0] = [
        str(ROOT / "examples" / "mini_cmt"),
        str(ROOT / "examples" / "mini_cmt" / "tools"),
    ]
    import torch
    import train as mini  # examples/mini_cmt/tools/train.py

    torch.set_num_threads(1)
    options = ["--dropout", "0", "--seed", "0", "--modality-dropout", str(case.get("drop", 0.0))]
    options += ["--with-cp" if case.get("with_cp") else "--no-cp"] + (
        ["--frame", args.frame] if args.frame else []
    )
    options += ["--cfg-options", "optimizer.lr_mult.bias_scale=10.0"]
    if case["patched"] and "aqr" in case:
        options.append(f"model.pts_bbox_head.transformer.aqr={case['aqr']!r}")
    mini.PRESETS["mini"] = SIZES
    mini_args = mini.parse_args(options)
    config, model = mini.build(mini_args)
    transformer = model.pts_bbox_head.transformer
    assert flashbias_patch.status()["installed"] == case["patched"]
    if "aqr" in case and not case["patched"]:
        transformer.aqr = flashbias_patch.aqr.AdaptiveQueryRouter(SIZES["embed_dims"], SEGMENTS)
        give_dense_bias(transformer)
    router = transformer.aqr if "aqr" in case else None
    frames = mini.load_frames(mini_args)
    batch = mini.make_batch(frames, **config["data"])
    optimizer = torch.optim.AdamW(
        mini.parameter_groups(model, config["optimizer"]),
        weight_decay=config["optimizer"]["weight_decay"],
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / config["optimizer"]["warmup"])
    )
    result: Dict[str, Any] = {"loss": [], "bias_scale": [], "gradient": []}
    times = []
    model.train()
    for step in range(1, args.steps + 1):
        start = time.process_time()
        mini.draw_step(batch, mini_args, step, 0)
        check = (
            router is not None
            and case["patched"]
            and not case.get("drop")
            and step in CHECKED_STEPS
        )
        with Captured(transformer, check) as captured:
            losses = model(**batch)
            loss = sum(losses.values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        if check and "drop" not in case["aqr"]:
            result["gradient"].append({"step": step, **compare_gradient(transformer, captured)})
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["optimizer"]["max_norm"])
        if router is not None:
            result["bias_scale"].append(router.bias_scale.item())
        optimizer.step()
        warmup.step()
        times.append(time.process_time() - start)
        result["loss"].append(
            round(sum(v.item() for name, v in losses.items() if "aqr" not in name), 4)
        )
    result["last_loss"] = statistics.mean(result["loss"][-20:])
    result["cpu_ms"] = 1000 * statistics.median(times[5:] or times)
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    result["dropped"] = under_drop(mini, model, router, batch, mini_args)
    result["machine"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
        "processor": processor(),
    }
    if router is not None:
        result["seen"] = look(mini, model, batch, mini_args)
    Path(args.out).write_text(json.dumps(result))


def dense_bias(router: Any, x: Any, x_img: Any, query: Any) -> Any:
    """The router's bias (B, M, N) by its formula in plain PyTorch, in the precision of its inputs.

    x (B, C, h, w) or None, x_img (B, V, C, h, w); the cameras are one segment, or one each where
    the router has as many.
    """
    import torch

    batch, views, _, height, width = x_img.shape
    cameras = router.num_segments - (x is not None)
    lengths = [views // cameras * height * width] * cameras
    if x is not None:
        lengths = [x.shape[-2] * x.shape[-1], *lengths]
    scores = router.bias_scale * (logits_of(router, x, x_img, query).softmax(-1) + router.eps).log()
    return torch.cat(
        [scores[..., s : s + 1].expand(-1, -1, length) for s, length in enumerate(lengths)], -1
    )


def logits_of(router: Any, x: Any, x_img: Any, query: Any) -> Any:
    """The router's logits (B, M, S) but for `visible_gain`, by their formula in plain PyTorch."""
    import torch
    import torch.nn.functional as F

    cameras = router.num_segments - (x is not None)
    features = x_img.mean((-2, -1)).unflatten(1, (cameras, -1)).mean(2)
    if x is not None:
        features = torch.cat([x.mean((-2, -1))[:, None], features], 1)
    hidden = F.gelu(
        F.linear(F.layer_norm(query, query.shape[-1:]), router.query_proj, router.query_proj_bias)
    )
    content = F.linear(F.layer_norm(features, features.shape[-1:]), router.feature_proj)
    logits = F.linear(hidden, router.segment_proj, router.segment_bias)
    return logits + hidden @ content.transpose(1, 2) * hidden.shape[-1] ** -0.5


def operands(args: Any, kwargs: Any) -> Any:
    """(x or None, x_img (B, V, C, h, w), query) of a call of CmtTransformer, or of
    CmtImageTransformer, which has `bs`."""
    if "bs" in kwargs:
        x_img, query = args[:2]
        return None, x_img.unflatten(0, (kwargs["bs"], -1)).detach(), query.detach()
    x, x_img, query = (tensor.detach() for tensor in args[:3])
    return x, x_img.unflatten(0, (len(x), -1)), query


def give_dense_bias(transformer: Any) -> None:
    """Without a patch: the bias as the mask of every cross attention."""
    _give(transformer, lambda args, kwargs: dense_bias(transformer.aqr, *operands(args, kwargs)))


def give_dense_windows(head: Any) -> None:
    """Without a patch: the windows of head.transformer.aqr painted into a dense bias, as the mask
    of every cross attention.

    This is how repositories with such a router do it: (B, M, N), repeated over the heads.
    """
    own = head.query_embed
    given: Dict[str, Any] = {}

    def query_embed(ref_points: Any, img_metas: Any) -> Any:
        given.update(ref_points=ref_points.detach(), img_metas=img_metas)
        return own(ref_points, img_metas)

    head.query_embed = query_embed
    router = head.transformer.aqr
    _give(
        head.transformer,
        lambda args, kwargs: paint(router, head.pc_range, *operands(args, kwargs), **given),
    )


def paint(
    router: Any, pc_range: Any, x: Any, x_img: Any, query: Any, ref_points: Any, img_metas: Any
) -> Any:
    """The window router's bias (B, M, N) in plain PyTorch: a weight scattered onto the cells of
    each window."""
    import torch

    batch, views, _, height, width = x_img.shape
    low, high = (ref_points.new_tensor(list(pc_range[i : i + 3])) for i in (0, 3))
    points = ref_points * (high - low) + low
    matrices = torch.stack(
        [torch.stack([torch.as_tensor(m) for m in meta["lidar2img"]]) for meta in img_metas]
    ).to(points)
    seen = torch.einsum(
        "bvij,bmj->bmvi", matrices, torch.cat([points, torch.ones_like(points[..., :1])], -1)
    )
    pixels = seen[..., :2] / seen[..., 2:3].clamp(min=0.1)
    size = pixels.new_tensor(img_metas[0]["pad_shape"][0][1::-1])  # width, height
    visible = (seen[..., 2] > 0.1) & (pixels >= 0).all(-1) & (pixels < size).all(-1)
    cells = (pixels / size * pixels.new_tensor([width, height])).long()
    logits = logits_of(router, x, x_img, query)
    on_bev = [] if x is None else [torch.ones_like(visible[..., 0])]
    logits = logits + torch.stack([*on_bev, visible.any(-1)], -1) * router.visible_gain
    weights = logits.tanh() * router.bias_scale.clamp(router.min_scale, router.max_scale)
    if router.camera_windows == "first":  # one window in the first camera that sees the query
        first = (visible.cumsum(-1) == 1).int().cumsum(-1).eq(0).sum(-1).clamp(max=views - 1)
        cells = cells.gather(2, first[..., None, None].expand(-1, -1, 1, 2))
        shown = [(visible.any(-1), first, cells[:, :, 0])]
    else:
        shown = [(visible[..., view], view, cells[:, :, view]) for view in range(views)]
    bias = weights.new_zeros(batch, query.shape[1], views * height * width)
    for seen_there, view, cell in shown:
        place = cell[..., 1], cell[..., 0]
        bias = scatter(
            bias,
            weights[..., -1],
            seen_there,
            place,
            router.window,
            router.gaussian,
            (height, width),
            view,
        )
    if x is None:
        return bias
    rows, columns = x.shape[-2:]
    column, row = (
        (ref_points[..., i] * n).long().clamp(0, n - 1) for i, n in ((0, columns), (1, rows))
    )
    bev = weights.new_zeros(batch, query.shape[1], rows * columns)
    everywhere = torch.ones_like(row, dtype=torch.bool)
    bev = scatter(
        bev,
        weights[..., 0],
        everywhere,
        (row, column),
        router.lidar_window,
        router.gaussian,
        (rows, columns),
        0,
    )
    return torch.cat([bev, bias], -1)


def scatter(
    bias: Any, weights: Any, visible: Any, place: Any, side: int, sigma: Any, grid: Any, view: Any
) -> Any:
    """`bias` (B, M, views * rows * columns) with each query's weight added in its window at
    `place`, row and column."""
    import torch

    offsets = torch.arange(side, device=bias.device) - (side - 1) // 2
    dy, dx = (t.flatten() for t in torch.meshgrid(offsets, offsets, indexing="ij"))
    y, x = place[0][..., None] + dy, place[1][..., None] + dx
    inside = visible[..., None] & (y >= 0) & (y < grid[0]) & (x >= 0) & (x < grid[1])
    profile = 1.0 if sigma is None else torch.exp(-(dy * dy + dx * dx) / (2.0 * sigma**2))
    view = view[..., None] if torch.is_tensor(view) else view
    keys = (view * grid[0] + y.clamp(0, grid[0] - 1)) * grid[1] + x.clamp(0, grid[1] - 1)
    return bias.scatter_add(
        2, keys, torch.where(inside, weights[..., None] * profile, weights.new_zeros(()))
    )


def _give(transformer: Any, bias_of: Any) -> None:
    heads = transformer.decoder.layers[0].attentions[1].num_heads
    masks = {}

    def before(module: Any, args: Any, kwargs: Any) -> None:
        masks["cross"] = bias_of(args, kwargs).repeat_interleave(heads, 0)

    def before_decoder(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attn_masks": [kwargs["attn_masks"][0], masks["cross"]]}

    transformer.register_forward_pre_hook(before, with_kwargs=True)
    transformer.decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)


class Captured:
    """The inputs and outputs of a transformer in one step, and the outputs' gradients."""

    def __init__(self, transformer: Any, active: bool) -> None:
        self.handle = (
            transformer.register_forward_hook(self.hook, with_kwargs=True) if active else None
        )

    def hook(self, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.args, self.kwargs, self.out = args, kwargs, out[0]
        self.out.retain_grad()

    def __enter__(self) -> Captured:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.handle is not None:
            self.handle.remove()


def compare_gradient(transformer: Any, captured: Captured) -> Dict[str, float]:
    """bias_scale's gradient against float64 and a dense bias, unpatched, for the same inputs and
    output gradient."""
    import torch

    import flashbias_patch

    flashbias_patch.uninstall()
    try:
        reference = copy.deepcopy(transformer).double()
        for layer in reference.decoder.layers:
            layer.use_checkpoint = False
        give_dense_bias(reference)

        def double(value: Any) -> Any:
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.detach().double() if floating else value

        reference.zero_grad()
        out = reference(
            *map(double, captured.args), **{k: double(v) for k, v in captured.kwargs.items()}
        )[0]
        out.backward(captured.out.grad.double())
    finally:
        flashbias_patch.install()
    got, expected = transformer.aqr.bias_scale.grad.item(), reference.aqr.bias_scale.grad.item()
    return {
        "patched": got,
        "reference": expected,
        "relative_error": abs(got - expected) / abs(expected),
    }


def under_drop(
    mini: Any, model: Any, router: Any, batch: Dict[str, Any], args: Any
) -> Dict[str, Any]:
    """Loss, and the mean weight on the lidar, with nothing, the lidar or the cameras zeroed; noise
    of fixed seeds."""
    import torch

    from flashbias_patch import aqr

    if router is not None:
        router.drop = None
    found: Dict[str, Any] = {}
    args = copy.copy(args)
    args.modality_dropout = 0.0
    for sensor in (None, "lidar", "camera"):
        args.drop = sensor
        losses, weights = [], []
        for step in range(10_000, 10_004):
            mini.draw_step(batch, args, step, 0)
            with torch.no_grad(), aqr.record_routing() as seen:
                losses.append(
                    sum(v.item() for name, v in model(**batch).items() if "aqr" not in name)
                )
            weights += [routing.weights[..., 0].mean().item() for routing in seen]
        found[sensor or "none"] = {
            "loss": statistics.mean(losses),
            "lidar_weight": statistics.mean(weights) if weights else None,
        }
    return found


def look(mini: Any, model: Any, batch: Dict[str, Any], args: Any) -> Dict[str, Any]:
    """Object queries' places, in metres and in the cameras, and their weight on the lidar."""
    import torch

    from flashbias_patch import aqr

    args = copy.copy(args)
    args.drop, args.modality_dropout = None, 0.0
    mini.draw_step(batch, args, 10_000, 0)
    model.eval()
    with torch.no_grad(), aqr.record_routing() as seen:
        model(points=batch["points"], img=batch["img"], img_metas=batch["img_metas"])
    if not seen:
        return {}
    head = model.pts_bbox_head
    meta = batch["img_metas"][0]
    geometry = aqr.Geometry(
        head.reference_points.detach().sigmoid()[None],
        head.pc_range,
        meta["lidar2img"][None],
        meta["img_shape"],
    )
    found = aqr.places(geometry, (2, 2), (len(meta["lidar2img"]), 2, 2))
    return {
        "xy": found.query_xy[0].tolist(),
        "valid": found.valid[0].tolist(),
        "boxes": batch["gt_bboxes_3d"][0].tolist(),
        "lidar_weight": seen[0].weights[0, :, 0].tolist(),
        "image_size": list(meta["img_shape"]),
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.machine()


# -- pictures --------------------------------------------------------------------------------------


def draw(folder: Path, seen: Dict[str, Any], report: Dict[str, Any], frame: Optional[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    xy, valid, weight = (
        np.array(seen["xy"]),
        np.array(seen["valid"]),
        np.array(seen["lidar_weight"]),
    )
    bounds = {"vmin": float(weight.min()), "vmax": float(weight.max()), "cmap": "coolwarm"}

    figure, axes = plt.subplots(figsize=(5.2, 4.4), dpi=100)
    boxes = np.array(seen["boxes"])
    if len(boxes):
        axes.scatter(
            boxes[:, 0],
            boxes[:, 1],
            marker="s",
            s=26,
            facecolors="none",
            edgecolors="0.6",
            label="objects",
        )
    dots = axes.scatter(xy[:, 0, 0], xy[:, 0, 1], c=weight, s=22, **bounds)
    axes.set(
        aspect="equal",
        xlabel="x, m",
        ylabel="y, m",
        title="Weight on the lidar, by query, from above",
    )
    figure.colorbar(dots, ax=axes, shrink=0.85)
    save(figure, folder / "aqr_bev.png")

    figure, axes = plt.subplots(figsize=(5.2, 3.0), dpi=100)
    for name, case in report["cases"].items():
        if case["bias_scale"]:
            axes.plot(
                range(1, len(case["bias_scale"]) + 1),
                case["bias_scale"],
                label=name,
                linestyle="--" if "unpatched" in name else "-",
            )
    axes.set(xlabel="step", ylabel="bias_scale")
    axes.legend(fontsize=7)
    save(figure, folder / "aqr_bias_scale.png")

    sys.path.insert(0, str(ROOT / "examples" / "mini_cmt"))
    from projects.mmdet3d_plugin.datasets import CAMERAS, load_frame, synthetic_frame
    from projects.mmdet3d_plugin.datasets.frame import prepare_image

    images = (load_frame(frame) if frame else synthetic_frame(0)).images
    height, width = seen["image_size"]
    scale = 240 / width
    order = (
        "CAM_FRONT_LEFT",
        "CAM_FRONT",
        "CAM_FRONT_RIGHT",
        "CAM_BACK_LEFT",
        "CAM_BACK",
        "CAM_BACK_RIGHT",
    )
    figure, grid = plt.subplots(2, 3, figsize=(7.4, 2.7), dpi=100)
    for axes, camera in zip(grid.flat, order):
        view = CAMERAS.index(camera) + 1
        grey = prepare_image(images[camera], (240, int(height * scale)))[0].mean(0)
        axes.imshow(grey, cmap="gray", extent=(0, width, height, 0), vmin=-4.0, vmax=3.0)
        points = xy[valid[:, view], view] * width
        shown = weight[valid[:, view]]
        axes.scatter(
            points[:, 0], points[:, 1], c=shown, s=16, edgecolors="k", linewidths=0.4, **bounds
        )
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        axes.set_title(camera[4:].lower().replace("_", " "), fontsize=7, pad=2)
    save(figure, folder / "aqr_cameras.png")


def save(figure: Any, path: Path) -> None:
    """A PNG of few colours, to stay small; the rare ones are kept."""
    import io

    from PIL import Image

    figure.tight_layout(pad=0.4)
    raw = io.BytesIO()
    figure.savefig(raw)
    Image.open(raw).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE).save(
        path, optimize=True
    )


if __name__ == "__main__":
    main()
