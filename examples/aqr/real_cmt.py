"""The real CMT head and transformer (fusion and camera, unmodified source) with a router, by config
override only.

    python examples/aqr/real_cmt.py CMT_CHECKOUT FRAME_DIR [--steps 20] [--device cuda] [--out
    results.json] python examples/aqr/real_cmt.py --table results.json docs/aqr.md       # its
    figures into the page

CMT_CHECKOUT is a working tree of junjie18/CMT, FRAME_DIR a nuScenes frame in mmdet3d's info format.
The backbones are left out: BEV features (512, 128, 128) are made from the lidar points and camera
features (256, 20, 50) from the images by fixed random projections, so that neither spconv nor
compiled OpenMMLab operators are needed. A process for each head, patched and unpatched; in each:
AQR off and on, checkpointing off and on. Unpatched, the bias is a dense mask. With `--windows
window=15` the router's bias is windows (bias='window'), with `--windows ''` those by default.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any, Dict, List, Optional

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"fusion": "projects/configs/fusion/cmt_voxel0100_r50_800x320_cbgs.py",
           "camera": "projects/configs/camera/cmt_camera_vov_1600x640_cbgs.py"}  # fmt: skip
CAMERAS = 6
CLASSES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)
# of the page, without and with --windows
MARKS = (
    ("<!-- real CMT: examples/aqr/real_cmt.py --table -->", "<!-- end of real CMT -->"),
    (
        "<!-- real CMT with windows: examples/aqr/real_cmt.py --windows --table -->",
        "<!-- end of windows -->",
    ),
)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cmt", metavar="CMT_CHECKOUT", nargs="?")
    parser.add_argument("frame", metavar="FRAME_DIR", nargs="?")
    parser.add_argument("--heads", nargs="+", choices=sorted(CONFIGS), default=sorted(CONFIGS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bs", type=int, default=2)
    parser.add_argument(
        "--attn", default="PETRMultiheadAttention", help="class of the cross attention"
    )
    parser.add_argument("--bev", type=int, default=128, help="N x N lidar tokens")
    parser.add_argument(
        "--camera",
        type=int,
        nargs=2,
        default=(20, 50),
        metavar=("H", "W"),
        help="tokens of a camera",
    )
    parser.add_argument("--queries", type=int, default=900)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--locality", action="store_true")
    parser.add_argument(
        "--windows",
        metavar="KEY=VALUE,...",
        help="bias='window' with these options of `aqr`; '' for none",
    )
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=("off", "on"))
    parser.add_argument("--out", metavar="FILE.json")
    parser.add_argument(
        "--table",
        nargs=2,
        metavar=("FILE.json", "PAGE.md"),
        help="write the table into a page, stop",
    )
    parser.add_argument("--child", choices=("0", "1"), help=argparse.SUPPRESS)  # patched or not
    args = parser.parse_args(argv)
    if args.table:
        page = Path(args.table[1])
        report = json.loads(Path(args.table[0]).read_text())
        begin, end = MARKS[report.get("windows") is not None]
        before, _, rest = page.read_text().partition(begin)
        page.write_text(
            before + begin + "\n" + tables(report) + "\n" + end + rest.partition(end)[2]
        )
        return
    if args.frame is None:
        parser.error("CMT_CHECKOUT and FRAME_DIR are needed")
    if args.child:
        Path(args.out).write_text(json.dumps(run_cases(args, args.heads[0], args.child == "1")))
        return
    given = list(sys.argv[1:] if argv is None else argv)
    results: Dict[str, Any] = {}
    report: Dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for head in args.heads:
            results[head] = {}
            for patched in ("0", "1"):
                target = os.path.join(folder, head + patched)
                environment = {
                    **os.environ,
                    "FLASHBIAS_PATCH": patched,
                    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                }
                command = [
                    sys.executable,
                    "-W",
                    "ignore",
                    __file__,
                    *given,
                    "--heads",
                    head,
                    "--child",
                    patched,
                ]
                done = subprocess.run(
                    [*command, "--out", target], env=environment, stderr=subprocess.PIPE, text=True
                )
                if done.returncode:
                    print(done.stderr[-3000:], file=sys.stderr)
                    results[head]["patched" if patched == "1" else "unpatched"] = {
                        "error": done.stderr[-300:]
                    }
                    continue
                found = json.loads(Path(target).read_text())
                results[head].update(found.pop("cases"))
                report.update(found)
            compare(results[head])
            if args.out:  # what is known already, should time run out
                report.update(
                    steps=args.steps,
                    bs=args.bs,
                    bev=args.bev,
                    camera=args.camera,
                    layers=args.layers,
                    windows=args.windows,
                    command=command_of(args, given),
                    heads=results,
                )
                Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


def command_of(args: argparse.Namespace, given: List[str]) -> str:
    """As it was called, without this machine's paths."""
    words = {args.cmt: "CMT", args.frame: "FRAME", args.out: os.path.basename(args.out)}
    return " ".join(["python examples/aqr/real_cmt.py", *(words.get(word, word) for word in given)])


def run_cases(args: argparse.Namespace, head: str, patched: bool) -> Dict[str, Any]:
    """Every case of one head in this process, one after the other."""
    import torch

    import flashbias_patch  # the one line a user adds

    assert flashbias_patch.status()["installed"] == patched
    sys.path.append(str(ROOT / "benchmarks"))
    import detectors  # benchmarks/detectors.py

    detectors.make_importable(args.device, flash=not patched)
    args.out = os.path.abspath(args.out)
    args.frame = os.path.abspath(args.frame)
    sys.path.insert(0, os.path.abspath(args.cmt))
    os.chdir(args.cmt)
    cases: Dict[str, Any] = {}
    for with_cp in (word == "on" for word in args.checkpointing):
        for aqr in (False, True):
            name = f"{'on' if aqr else 'off'}, {'patched' if patched else 'unpatched'}"
            name += ", checkpointed" if with_cp else ""
            start = time.perf_counter()
            try:
                cases[name] = run_case(args, head, aqr, patched, with_cp)
            except RuntimeError as error:  # a dense bias under reentrant checkpointing, for one
                cases[name] = {"error": (str(error).strip().splitlines() or ["?"])[0]}
            seconds = time.perf_counter() - start
            shown = {k: v for k, v in cases[name].items() if k not in ("losses", "bias_scale")}
            print(f"{head:<7} {name:<30} {seconds:4.0f} s  {json.dumps(shown)}", flush=True)
            gc.collect()
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    return {"cases": cases, "torch": torch.__version__, "device": device}


def run_case(
    args: argparse.Namespace, head_name: str, aqr: bool, patched: bool, with_cp: bool
) -> Dict[str, Any]:
    import numpy as np
    import torch
    from mmcv import Config

    import flashbias_patch
    from flashbias_patch.aqr import options as aqr_options

    options = {"model.pts_bbox_head.transformer.aqr.enable": True} if aqr and patched else {}
    windows = None if args.windows is None else aqr_options.pairs(args.windows, "--windows")
    given = (
        {"locality": True}
        if args.locality
        else {}
        if windows is None
        else {"bias": "window", **windows}
    )
    if options:
        options.update(
            {f"model.pts_bbox_head.transformer.aqr.{name}": value for name, value in given.items()}
        )
    config = Config.fromfile(CONFIGS[head_name])
    config.merge_from_dict(options)  # what --cfg-options does
    head_config = config.model.pts_bbox_head
    layers = head_config.transformer.decoder.transformerlayers
    layers.with_cp = with_cp
    layers.attn_cfgs[1]["type"] = args.attn
    for attention in layers.attn_cfgs:
        attention["dropout"] = 0.0
    head_config.transformer.decoder.num_layers = args.layers
    head_config.num_query = args.queries
    head_config.update(train_cfg=config.model.train_cfg.pts, test_cfg=config.model.test_cfg.pts)
    head_config.train_cfg.grid_size = [args.bev * 8, args.bev * 8, 40]

    import detectors
    import projects.mmdet3d_plugin.models.dense_heads.cmt_head as cmt_head
    from mmdet3d.models import build_head

    detectors.move_denoising(cmt_head.CmtHead, args.device)
    torch.manual_seed(0)
    np.random.seed(0)
    head = build_head(head_config)
    head.init_weights()
    if aqr and not patched:
        import aqr as benchmark  # benchmarks/aqr.py

        dims = head.transformer.embed_dims
        if windows is None:
            segments = 2 if head_name == "fusion" else CAMERAS
            head.transformer.aqr = flashbias_patch.aqr.AdaptiveQueryRouter(dims, segments)
            benchmark.give_dense_bias(head.transformer)
        else:
            segments = 2 if head_name == "fusion" else 1
            head.transformer.aqr = flashbias_patch.aqr.WindowRouter(dims, segments, **windows)
            benchmark.give_dense_windows(head)
    head = head.to(args.device).train()
    x, x_img, metas, boxes, labels = inputs(args, torch, np)
    x = x if head_name == "fusion" else None
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4, weight_decay=0.01)
    cuda = args.device.startswith("cuda")
    before = dict(flashbias_patch.status()["calls"])
    losses, times, scales, peak = [], [], [], 0.0
    for step in range(args.steps):
        torch.manual_seed(100 + step)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        out = head.loss(boxes, labels, head([x], [x_img], metas))
        loss = sum(value for name, value in out.items() if "loss" in name)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient = head.transformer.aqr.bias_scale.grad if aqr else None
        gradient = None if gradient is None else gradient.item()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 35.0)
        if aqr:
            scales.append([head.transformer.aqr.bias_scale.item(), gradient])
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
            peak = max(peak, torch.cuda.max_memory_allocated() / 2**20)
        times.append(time.perf_counter() - start)
        losses.append(float(loss))
    after = dict(flashbias_patch.status()["calls"])
    return {
        "losses": losses,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "step_s": statistics.median(times[2:] or times),
        "peak_mib": peak,
        "bias_scale": scales,  # value and gradient at each step, before it
        "calls": {
            name: count - before.get(name, 0)
            for name, count in after.items()
            if count > before.get(name, 0)
        },
    }


def compare(cases: Dict[str, Any]) -> None:
    """bias_scale's gradient in the first step, where the weights are the same, against the
    unpatched dense bias'."""
    dense = cases.get("on, unpatched", {}).get("bias_scale")
    for name, case in cases.items():
        if dense and name.startswith("on, patched") and case.get("bias_scale"):
            ours, theirs = case["bias_scale"][0][1], dense[0][1]
            case["gradient_error"] = abs(ours - theirs) / abs(theirs)
            print(
                f"{name}: gradient of bias_scale {ours:.7g}, by the dense bias {theirs:.7g}",
                flush=True,
            )


def tables(report: Dict[str, Any]) -> str:
    camera = "{} x {}".format(*report["camera"])
    windows = (
        ""
        if report.get("windows") is None
        else f" `aqr`: bias='window', {report['windows'] or 'by default'}."
    )
    lines = [
        f"{report['steps']} steps on one nuScenes frame, batch {report['bs']}, "
        f"{report['layers']} layers, "
        f"{report['bev']} x {report['bev']} lidar tokens and {CAMERAS} x {camera} camera tokens, "
        "float32; on a GPU, "
        "time: median step of head, loss and optimiser, memory: peak of tensors. "
        f"{report['device']}, torch {report['torch']}.{windows}",
        "",
        "| head | AQR | loss, first and last | ms a step | MiB | bias_scale, first and last "
        "| gradient against the dense bias |",
        "|---|---|---|---|---|---|---|",
    ]
    for head, cases in report["heads"].items():
        for name, case in cases.items():
            if "error" in case:
                lines.append(
                    f"| {head} | {name} | {case['error'].strip().splitlines()[-1][:52]} ... | | "
                    "| | |"
                )
                continue
            scales = case["bias_scale"]
            moved = f"{scales[0][0]:.4f}, {scales[-1][0]:.4f}" if scales else ""
            error = f"{case['gradient_error']:.0e}" if "gradient_error" in case else ""
            cost = (
                f"{1e3 * case['step_s']:.0f} | {case['peak_mib']:.0f}"
                if case["peak_mib"]
                else " | "
            )
            lines.append(
                f"| {head} | {name} | {case['first_loss']:.3f}, {case['last_loss']:.3f} | {cost} "
                f"| {moved} | {error} |"
            )
    return "\n".join(lines)


def inputs(args: argparse.Namespace, torch: Any, np: Any) -> Any:
    """BEV features, camera features, metas, boxes and labels of the one real frame, repeated."""
    import cv2
    from mmdet3d.core.bbox import LiDARInstance3DBoxes

    path = next(Path(args.frame).glob("*.pkl"))
    content = pickle.loads(path.read_bytes())
    info, names = (
        content["data_list"][0],
        {v: k for k, v in content["metainfo"]["categories"].items()},
    )
    generator = torch.Generator().manual_seed(0)

    height, width = args.camera[0] * 16, args.camera[1] * 16
    patches, matrices = [], []
    for camera in info["images"].values():
        image = cv2.imread(os.path.join(args.frame, camera["img_path"])).astype(np.float32) / 255.0
        scale = width / image.shape[1]
        image = cv2.resize(image, (width, round(image.shape[0] * scale)))
        top = image.shape[0] - height
        patch = (
            torch.from_numpy(image[top:])
            .unflatten(0, (args.camera[0], 16))
            .unflatten(2, (args.camera[1], 16))
        )
        patches.append(patch.permute(0, 2, 1, 3, 4).flatten(2) - 0.5)
        matrix = np.eye(4)
        matrix[:3, :3] = np.array(camera["cam2img"])
        matrix[:2] *= scale
        matrix[1, 2] -= top
        matrices.append((matrix @ np.array(camera["lidar2cam"])).astype(np.float32))
    pixels = torch.stack(patches)
    x_img = (pixels @ torch.randn(pixels.shape[-1], 256, generator=generator) / 8).permute(
        0, 3, 1, 2
    )

    lidar = info["lidar_points"]
    points = np.fromfile(os.path.join(args.frame, lidar["lidar_path"]), dtype=np.float32)
    points = torch.from_numpy(points.reshape(-1, lidar.get("num_pts_feats", 5)))
    cell = ((points[:, :2] + 54.0) / 108.0 * args.bev).long()
    inside = ((cell >= 0) & (cell < args.bev)).all(1)
    index = (cell[:, 1] * args.bev + cell[:, 0])[inside]
    features = torch.cat(
        [torch.ones(len(index), 1), points[inside, 2:4] / torch.tensor([2.0, 64.0])], 1
    )
    grid = torch.zeros(args.bev**2, 3).index_add(0, index, features).clamp(-8, 8)
    x = (grid @ torch.randn(3, 512, generator=generator)).T.reshape(1, 512, args.bev, args.bev)

    kept = [
        i
        for i in info["instances"]
        if i["bbox_3d_isvalid"]
        and i["bbox_label_3d"] >= 0
        and max(abs(v) for v in i["bbox_3d"][:2]) < 54
    ]
    boxes = np.nan_to_num(np.array([[*i["bbox_3d"], *i["velocity"]] for i in kept], np.float32))
    labels = torch.tensor([CLASSES.index(names[i["bbox_label_3d"]]) for i in kept])
    truth = LiDARInstance3DBoxes(boxes, box_dim=9, origin=(0.5, 0.5, 0.5))
    meta = {
        "lidar2img": matrices,
        "pad_shape": [(height, width, 3)] * 6,
        "img_shape": [(height, width, 3)] * 6,
        "gt_bboxes_3d": types.SimpleNamespace(_data=truth),
        "gt_labels_3d": types.SimpleNamespace(_data=labels),
    }
    device = args.device
    return (
        x.repeat(args.bs, 1, 1, 1).to(device),
        x_img.repeat(args.bs, 1, 1, 1).to(device),
        [dict(meta) for _ in range(args.bs)],
        [truth.to(device)] * args.bs,
        [labels.to(device)] * args.bs,
    )


if __name__ == "__main__":
    main()
