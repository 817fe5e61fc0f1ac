"""Real detectors on one real nuScenes frame, from checkouts of their public repositories, which
stay as they are.

`build` is the entry. A process can hold one repository only: all of them call their package
`projects`. The images go through ResNet-50 with random weights; StreamPETR runs in streaming mode,
the one frame seen again half a second later
by a car that drove on. Nothing here imports flashbias_patch: whether attention is patched is the
caller's business.
"""

from __future__ import annotations

import importlib
import os
import pickle
import runpy
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

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
MEAN, STD = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)  # BGR
SPEED, INTERVAL = 5.0, 0.5  # StreamPETR's car: metres a second, seconds between frames


class Options(NamedTuple):
    """The varied settings. `size` (W, H); `attn` the class of the cross attention; `fp16` as mmcv's
    Fp16OptimizerHook does."""

    device: str = "cuda"
    bs: int = 2
    size: Tuple[int, int] = (1600, 640)
    attn: str = "PETRMultiheadAttention"
    dropout: float = 0.1
    with_cp: bool = False
    fp16: bool = False
    layers: int = 6


class Voxels(NamedTuple):
    """How a lidar branch sorts points into voxels; it keeps `most` points of each."""

    low: Tuple[float, ...]  # metres: x, y, z of the range's corner
    size: Tuple[float, ...]
    most: int


class Detector(NamedTuple):
    net: torch.nn.Module
    batch: Callable[
        [int], Dict[str, Any]
    ]  # step -> keyword arguments of net(return_loss=True, ...)
    resize: Callable[[int], Callable[[int], Dict[str, Any]]]  # batch size -> another `batch`
    voxels: Optional[Voxels] = None


class Missing(types.ModuleType):
    """A module that is not installed and that nothing here calls: says so if it is called after
    all."""

    __path__: List[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(f"{self.__name__}.{name} is not installed")

        return missing


def _absent(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:
        return True
    return False


def _stand_in(*names: str) -> None:
    for name in names:  # parents first
        module = sys.modules[name] = Missing(name)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)


def make_importable(device: str, flash: bool = True) -> None:
    """Names that old repositories import and current machines lack. `flash`: those of flash-attn
    0.2 too."""
    if device == "cpu":
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment, method-assign]
    importlib.import_module("mmcv")
    compiled = not _absent("mmcv._ext")
    if not compiled:
        _stand_in("mmcv._ext")
    if _absent("spconv"):
        _stand_in("spconv", "spconv.pytorch", "spconv.pytorch.utils")
    if _absent("tkinter"):
        _stand_in("turtle")
    for names in (
        ("IPython",),
        ("fvcore", "fvcore.nn", "fvcore.nn.weight_init"),
    ):  # a debugger; another backbone's
        if _absent(names[0]):
            _stand_in(*names)
    if flash and _absent("flash_attn"):
        _stand_in("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding")
    if not compiled:
        _plain_focal_loss()


def _plain_focal_loss() -> None:
    """mmdet's own focal loss in plain torch, which it keeps for the CPU, instead of the compiled
    one."""
    losses = importlib.import_module("mmdet.models.losses.focal_loss")

    def focal(pred: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        return losses.py_sigmoid_focal_loss(
            pred,
            torch.nn.functional.one_hot(target, pred.size(1) + 1)[:, : pred.size(1)],
            *args,
            **kwargs,
        )

    losses.sigmoid_focal_loss = focal


def move_denoising(head: type, device: str) -> None:
    """The denoising loss indexes CPU tensors with CUDA indices, as torch 1.9 allowed: move them all
    to the device."""
    original = getattr(head, "prepare_for_dn", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    def prepare_for_dn(self: Any, *args: Any, **kwargs: Any) -> Any:
        *rest, known = original(self, *args, **kwargs)
        if known:
            known = {
                name: value.to(device) if torch.is_tensor(value) else value
                for name, value in known.items()
            }
        return (*rest, known)

    prepare_for_dn.__wrapped__ = original  # type: ignore[attr-defined]
    head.prepare_for_dn = prepare_for_dn  # type: ignore[attr-defined]


class Frame(NamedTuple):
    images: List[Any]  # (H, W, 3) uint8, BGR
    cam2img: List[Any]  # (3, 3)
    lidar2cam: List[Any]  # (4, 4)
    boxes: Any  # (G, 9) float32: centre, size, yaw, velocity
    labels: Any  # (G,) of CLASSES
    points: Any  # (P, 5) float32: x, y, z, intensity, time
    token: str


def read_frame(folder: str) -> Frame:
    """The first frame of mmdet3d's info file in `folder`: images, cameras and the boxes within 54
    metres."""
    import cv2
    import numpy as np

    content = pickle.loads(next(Path(folder).glob("*.pkl")).read_bytes())
    info, names = (
        content["data_list"][0],
        {v: k for k, v in content["metainfo"]["categories"].items()},
    )
    cameras = list(info["images"].values())
    kept = [
        i
        for i in info["instances"]
        if i["bbox_3d_isvalid"]
        and i["bbox_label_3d"] >= 0
        and max(abs(v) for v in i["bbox_3d"][:2]) < 54
    ]
    return Frame(
        [cv2.imread(os.path.join(folder, camera["img_path"])) for camera in cameras],
        [np.array(camera["cam2img"]) for camera in cameras],
        [np.array(camera["lidar2cam"]) for camera in cameras],
        np.nan_to_num(np.array([[*i["bbox_3d"], *i["velocity"]] for i in kept], np.float32)),
        np.array([CLASSES.index(names[i["bbox_label_3d"]]) for i in kept]),
        read_points(folder),
        info["token"],
    )


def read_points(folder: str) -> Any:
    """The frame's one sweep (P, 5): its own time is 0, where the file has the ring's number."""
    import numpy as np

    files = list(Path(folder).glob("*.pcd.bin"))
    if not files:
        return np.zeros((0, 5), np.float32)
    points = np.fromfile(files[0], np.float32).reshape(-1, 5)
    points[:, 4] = 0.0
    return points


def thinned(points: torch.Tensor, voxels: Voxels) -> torch.Tensor:
    """The points (P, 5) without those that a full voxel drops: the first of each voxel stay.

    spconv drops any of them on a GPU, others in each call: the lidar's own car is 1,512 points in
    one voxel of the frame, and two unpatched runs then differ by a tenth in the first gradient.
    """
    low, size = points.new_tensor(voxels.low), points.new_tensor(voxels.size)
    cells = ((points[:, :3] - low) / size).floor().long()
    cell = torch.unique(cells, dim=0, return_inverse=True)[1]
    in_order, order = torch.sort(cell, stable=True)
    rank = torch.arange(len(cell), device=cell.device) - torch.searchsorted(in_order, in_order)
    kept = torch.zeros_like(cell, dtype=torch.bool)
    kept[order] = rank < voxels.most
    return points[kept]


def scaled(frame: Frame, size: Tuple[int, int]) -> Tuple[torch.Tensor, Any, Any]:
    """Images (6, 3, H, W), normalised, scaled to `size`' width with the top cut off; intrinsics and
    lidar2img (6, 4, 4)."""
    import cv2
    import numpy as np

    width, height = size
    images, intrinsics, matrices = [], [], []
    for image, cam2img, lidar2cam in zip(frame.images, frame.cam2img, frame.lidar2cam):
        scale = width / image.shape[1]
        image = cv2.resize(image.astype(np.float32), (width, round(image.shape[0] * scale)))
        top = image.shape[0] - height
        images.append(
            ((image[top:] - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).transpose(
                2, 0, 1
            )
        )
        matrix = np.eye(4)
        matrix[:3, :3] = cam2img
        matrix[:2] *= scale
        matrix[1, 2] -= top
        intrinsics.append(matrix)
        matrices.append((matrix @ lidar2cam).astype(np.float32))
    return torch.from_numpy(np.stack(images)), np.stack(intrinsics), matrices


def lidar_features(net: torch.nn.Module, batch: Dict[str, Any]) -> List[torch.Tensor]:
    """What the lidar branch of a detector makes of a batch, (B, C, H, W) each; no gradients."""
    with torch.no_grad():
        return list(net.extract_pts_feat(batch["points"], None, batch["img_metas"]))  # type: ignore


def hold_lidar(net: torch.nn.Module, features: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """The lidar branch of a detector makes `features` of any points from now on, and takes no part
    in training: leaves, for their gradients.

    Its sparse convolutions and their voxels have another order in each run on a GPU. That rounding
    alone changes the first gradient by some per cent, and hides what attention does.
    """
    held = [feature.detach().clone().requires_grad_() for feature in features]
    net.extract_pts_feat = lambda *args, **kwargs: held  # type: ignore[assignment]
    return held


def _layers(model: Any) -> Any:
    return model.pts_bbox_head.transformer.decoder.transformerlayers


def _config(path: str) -> Any:
    """A config's `model` without its bases, which lie in a checkout of mmdetection3d."""
    from mmcv import ConfigDict

    return ConfigDict(runpy.run_path(path)["model"])


def _cmt_config() -> Any:
    model = _config("projects/configs/camera/cmt_camera_vov_1600x640_cbgs.py")
    fusion = _config("projects/configs/fusion/cmt_voxel0100_r50_800x320_cbgs.py")
    model.img_backbone, model.img_neck = fusion.img_backbone, fusion.img_neck
    return model


def _fusion0100_config() -> Any:
    return _config("projects/configs/fusion/cmt_voxel0100_r50_800x320_cbgs.py")


def _fusion0075_config() -> Any:
    """With the image branch of voxel0100: the repository's own needs weights of VoVNet."""
    model = _config("projects/configs/fusion/cmt_voxel0075_vov_1600x640_cbgs.py")
    small = _fusion0100_config()
    model.img_backbone, model.img_neck = small.img_backbone, small.img_neck
    return model


def _petr_config() -> Any:
    model = _config("projects/configs/petr/petr_r50dcn_gridmask_p4.py")
    for name in ("dcn", "stage_with_dcn"):  # a compiled operator
        model.img_backbone.pop(name, None)
    return model


def _streampetr_config() -> Any:
    model = _config("projects/configs/StreamPETR/stream_petr_r50_flash_704_bs2_seq_24e.py")
    model.img_roi_head = None  # wants boxes in the images, which a frame's info does not hold
    return model


class Family(NamedTuple):
    """`float32`: the parts to which mmcv's fp16 does not apply, as the configuration has it."""

    config: Callable[[], Any]
    repository: str
    plugin: Tuple[str, ...] = ("projects.mmdet3d_plugin",)
    streaming: bool = False
    lidar: bool = False
    float32: Tuple[str, ...] = ()


CMT_FLOAT32 = ("pts_voxel_encoder", "pts_middle_encoder", "pts_bbox_head")  # custom_fp16
FAMILIES = {
    "cmt": Family(_cmt_config, "junjie18/CMT"),
    "fusion0100": Family(_fusion0100_config, "junjie18/CMT", lidar=True, float32=CMT_FLOAT32),
    "fusion0075": Family(_fusion0075_config, "junjie18/CMT", lidar=True, float32=CMT_FLOAT32),
    "petr": Family(_petr_config, "megvii-research/PETR"),
    "streampetr": Family(_streampetr_config, "exiawsh/StreamPETR", streaming=True),
}


@contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def use_fp16(net: torch.nn.Module, float32: Sequence[str]) -> None:
    """As mmcv's Fp16OptimizerHook; the parts named in `float32` are then left in that precision, as
    CMT's own hook leaves them."""
    importlib.import_module("mmcv.runner").wrap_fp16_model(net)
    for name in float32:
        getattr(net, name).fp16_enabled = False


def build(family: str, checkout: str, frame: str, options: Options) -> Detector:
    """The detector `family` of `checkout` with seeded random weights, in training mode, and its
    batches."""
    import numpy as np

    make_importable(options.device)
    checkout = os.path.abspath(checkout)
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    read = read_frame(frame)
    with _inside(checkout):
        for name in FAMILIES[family].plugin:
            importlib.import_module(name)
        model = FAMILIES[family].config()
        voxels = _voxels(model) if FAMILIES[family].lidar else None
        model.img_backbone.pop("pretrained", None)
        model.use_grid_mask = False
        model.pts_bbox_head.transformer.decoder.num_layers = options.layers
        layers = _layers(model)
        layers.with_cp = options.with_cp
        layers.attn_cfgs[1]["type"] = options.attn
        for attention in layers.attn_cfgs:
            attention["dropout"] = options.dropout
        if options.dropout == 0.0 and "ffn_dropout" in layers:
            layers.ffn_dropout = 0.0
        torch.manual_seed(0)
        np.random.seed(0)
        net = importlib.import_module("mmdet3d.models").build_model(model)
        net.init_weights()
    move_denoising(type(net.pts_bbox_head), options.device)
    for cls in type(net.pts_bbox_head).__mro__[1:]:
        if "prepare_for_dn" in vars(cls):
            move_denoising(cls, options.device)
    net = net.to(options.device).train()
    if options.fp16:
        use_fp16(net, FAMILIES[family].float32)

    def resize(bs: int) -> Callable[[int], Dict[str, Any]]:
        return _batches(read, options, bs, FAMILIES[family], voxels)

    return Detector(net, resize(options.bs), resize, voxels)


def _voxels(model: Any) -> Voxels:
    layer = model.pts_voxel_layer
    return Voxels(tuple(layer.point_cloud_range[:3]), tuple(layer.voxel_size), layer.max_num_points)


def _batches(
    frame: Frame, options: Options, bs: int, family: Family, voxels: Optional[Voxels]
) -> Callable[[int], Dict[str, Any]]:
    boxes_class = importlib.import_module("mmdet3d.core.bbox").LiDARInstance3DBoxes
    width, height = options.size
    images, intrinsics, matrices = scaled(frame, options.size)
    truth = boxes_class(frame.boxes, box_dim=9, origin=(0.5, 0.5, 0.5))
    labels = torch.from_numpy(frame.labels).long()
    meta = {
        "lidar2img": matrices,
        "img_shape": [(height, width, 3)] * 6,
        "pad_shape": [(height, width, 3)] * 6,
        "ori_shape": [(900, 1600, 3)] * 6,
        "box_type_3d": boxes_class,
        "box_mode_3d": 0,
        "scale_factor": 1.0,
        "flip": False,
        "sample_idx": frame.token,
        "scene_token": frame.token,
        "gt_bboxes_3d": types.SimpleNamespace(_data=truth),
        "gt_labels_3d": types.SimpleNamespace(_data=labels),
    }
    device = options.device
    images = images.to(device)[None].repeat(bs, 1, 1, 1, 1)
    truth, labels = truth.to(device), labels.to(device)
    points = torch.from_numpy(frame.points)
    points = (points if voxels is None else thinned(points, voxels)).to(device)

    def still(step: int) -> Dict[str, Any]:
        # detach: PETR squeezes what it is given, in place
        return {
            "img": images.detach(),
            "img_metas": [dict(meta) for _ in range(bs)],
            "points": [points] * bs if voxels else None,
            "gt_bboxes_3d": [truth] * bs,
            "gt_labels_3d": [labels] * bs,
        }

    def at(value: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(bs, 1 frame, ...)"""
        value = torch.as_tensor(value).to(device, dtype)
        return value[None, None].repeat(bs, 1, *([1] * value.dim()))

    lidar2img, intrinsic = (
        torch.stack([torch.from_numpy(m) for m in matrices]),
        torch.from_numpy(intrinsics),
    )
    lidar2cam = torch.stack([torch.from_numpy(m).float() for m in frame.lidar2cam])

    def streamed(step: int) -> Dict[str, Any]:
        pose = torch.eye(4)
        pose[0, 3] = SPEED * INTERVAL * step
        nested = {name: [[None]] * bs for name in ("gt_bboxes", "gt_labels", "centers2d", "depths")}
        time = at(1.5e9 + INTERVAL * step, torch.float64)
        return {
            "img": images[:, None].detach(),
            "img_metas": [[dict(meta)] for _ in range(bs)],
            "gt_bboxes_3d": [[truth]] * bs,
            "gt_labels_3d": [[labels]] * bs,
            **nested,
            "prev_exists": at(float(step > 0)),
            "lidar2img": at(lidar2img),
            "intrinsics": at(intrinsic),
            "extrinsics": at(lidar2cam),
            "timestamp": time,
            "img_timestamp": time[..., None].repeat(1, 1, 6),
            "ego_pose": at(pose),
            "ego_pose_inv": at(torch.inverse(pose)),
        }

    return streamed if family.streaming else still
