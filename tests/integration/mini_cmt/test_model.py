"""What mini_cmt computes: masks, order of the keys, geometry, recomputation, losses, precision."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support.mini_cmt import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant")


@pytest.fixture(scope="module")
def built(mini_cmt):
    """(arguments, configuration, model, batch of two synthetic frames)."""
    args = mini_cmt.train.parse_args([*SMALL, "--bs", "2"])
    config, model = mini_cmt.train.build(args)
    batch = mini_cmt.train.make_batch(mini_cmt.train.load_frames(args), **config["data"])
    mini_cmt.train.draw_step(batch, args, 1, 0)
    return args, config, model, batch


def test_denoising_mask_blocks(mini_cmt):
    groups, size, queries = 3, 4, 5
    mask = mini_cmt.denoising.denoising_mask(groups, size, queries)
    noisy = groups * size
    assert mask.shape == (noisy + queries, noisy + queries) and mask.dtype == torch.bool
    assert (
        not mask[noisy:, noisy:].any()
        and mask[noisy:, :noisy].all()
        and not mask[:noisy, noisy:].any()
    )
    for i in range(groups):
        for j in range(groups):
            block = mask[i * size : (i + 1) * size, j * size : (j + 1) * size]
            assert block.all() if i != j else not block.any()


def test_pillars_without_scatter_reduce(mini_cmt, monkeypatch):
    """torch before 1.12 has none: the same maxima, and the same gradients."""
    if not hasattr(torch.Tensor, "scatter_reduce"):
        pytest.skip("nothing to compare with before torch 1.12")
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(500, 8, generator=generator, dtype=torch.float64).requires_grad_()
    pillar = torch.randint(0, 40, (500,), generator=generator)
    expected = mini_cmt.pillar_net.largest(features, pillar, 64)
    monkeypatch.setattr(mini_cmt.pillar_net, "Tensor", type("OldTensor", (), {}))
    found = mini_cmt.pillar_net.largest(features, pillar, 64)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(out.square().sum(), features)[0] for out in (found, expected)]
    assert torch.equal(*gradients)


def test_what_the_attentions_get(mini_cmt, built):
    """Self attention: the square mask. Cross attention: none, a zero float padding mask, all
    keys."""
    _, _, model, batch = built
    seen = []
    layer = model.pts_bbox_head.transformer.decoder.layers[0]
    hooks = [
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module.operation_name, args, kwargs)),
            with_kwargs=True,
        )
        for attention in layer.attentions
    ]
    model.train()
    model(**batch)
    for hook in hooks:
        hook.remove()
    largest = max(len(labels) for labels in batch["gt_labels_3d"])
    queries, keys = 2 * largest + 24, 6 * 6 + 6 * (96 // 16) * (48 // 16)
    (self_name, self_args, self_kwargs), (cross_name, cross_args, cross_kwargs) = seen
    assert (self_name, cross_name) == ("self_attn", "cross_attn")
    assert self_args[0].shape == (queries, 2, 256)
    assert self_kwargs["attn_mask"].shape == (queries, queries)
    assert self_kwargs["attn_mask"].dtype == torch.bool
    assert (
        cross_args[1].shape
        == cross_args[2].shape
        == cross_kwargs["key_pos"].shape
        == (keys, 2, 256)
    )
    assert cross_kwargs["attn_mask"] is None
    padding = cross_kwargs["key_padding_mask"]
    assert padding.shape == (2, keys) and padding.is_floating_point() and not padding.any()


def test_keys_are_bev_then_view_by_view(mini_cmt, built):
    transformer = built[2].pts_bbox_head.transformer
    x, x_img = torch.randn(2, 256, 3, 4), torch.randn(2 * 6, 256, 2, 5)
    _, memory = transformer(
        x,
        x_img,
        torch.randn(2, 7, 256),
        bev_pos_embed=torch.randn(12, 256),
        rv_pos_embed=torch.randn(12, 2, 5, 256),
    )
    assert memory.shape == (12 + 60, 2, 256)
    assert torch.equal(memory[1 * 4 + 3, 1], x[1, :, 1, 3])
    assert torch.equal(memory[12 + 4 * 10 + 1 * 5 + 2, 1], x_img[1 * 6 + 4, :, 1, 2])


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_recomputation_changes_no_gradient(mini_cmt, built, dropout):
    gradients = []
    for flag in ("--with-cp", "--no-cp"):
        args = mini_cmt.train.parse_args([*SMALL, flag, "--dropout", dropout])
        _, model = mini_cmt.train.build(args)
        torch.manual_seed(3)
        losses = model.train()(**built[3])
        sum(losses.values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_losses_are_named_by_layer(built):
    _, _, model, batch = built
    names = set(model.train()(**batch))
    parts = {"loss_cls", "loss_bbox", "dn_loss_cls", "dn_loss_bbox"}
    assert names == parts | {f"d0.{part}" for part in parts}


def test_a_frame_without_objects_trains(built):
    _, _, model, batch = built
    empty = {
        **batch,
        "gt_bboxes_3d": [boxes[:0] for boxes in batch["gt_bboxes_3d"]],
        "gt_labels_3d": [labels[:0] for labels in batch["gt_labels_3d"]],
    }
    losses = model.train()(**empty)
    assert "dn_loss_cls" not in losses and losses["loss_bbox"] == 0
    sum(losses.values()).backward()


@pytest.mark.parametrize("sensor", ["lidar", "camera"])
def test_a_dropped_sensor_has_no_effect(built, sensor):
    _, _, model, batch = built
    other = (
        {**batch, "img": batch["img"].flip(-1)}
        if sensor == "camera"
        else {**batch, "points": [cloud * 0.5 for cloud in batch["points"]]}
    )
    keys = ("points", "img", "img_metas")
    for drop in (None, sensor):
        metas = [{**meta, "drop": drop} for meta in batch["img_metas"]]
        one, two = (
            model.eval()(**{**{key: data[key] for key in keys}, "img_metas": metas})
            for data in (batch, other)
        )
        assert torch.equal(one[0]["scores"], two[0]["scores"]) is (drop == sensor)


def test_drawing_a_step_touches_no_global_generator(mini_cmt, built):
    args, _, _, batch = built
    args = copy.copy(args)
    args.modality_dropout = 1.0
    metas = {**batch, "img_metas": copy.deepcopy(batch["img_metas"])}
    before = torch.get_rng_state()
    drops = set()
    for step in range(12):
        mini_cmt.train.draw_step(metas, args, step, 0)
        drops |= {meta["drop"] for meta in metas["img_metas"]}
    assert drops == {"lidar", "camera"}
    assert torch.equal(before, torch.get_rng_state())


def test_a_query_is_embedded_as_the_token_it_lies_on(mini_cmt, built):
    """A point on the ray of a camera cell is embedded as the cell plus its place in the BEV."""
    _, config, model, batch = built
    positions = model.pts_bbox_head.positions
    meta = batch["img_metas"][0]
    height, width = 3, 6
    row, column, depth = 1, 3, 12.0  # in CAM_FRONT, which alone sees the middle of its image
    pixel = torch.tensor([(column + 0.5) * 16, (row + 0.5) * 16])
    seen = torch.tensor([pixel[0] * depth, pixel[1] * depth, depth, 1.0])
    point = (meta["img2lidar"][0] @ seen)[:3]
    reference = mini_cmt.boxes.normalise_points(point, config["data"]["pc_range"])[None, None]
    tokens = positions.rv_tokens(height, width, meta["img2lidar"], meta["img_shape"])
    query = positions.queries(
        reference, meta["lidar2img"][None], meta["img2lidar"][None], meta["img_shape"]
    )
    expected = positions.bev(reference[0, 0, :2]) + tokens[0, row, column]
    torch.testing.assert_close(query[0, 0], expected, rtol=1e-3, atol=1e-4)


def test_boxes_survive_the_code(mini_cmt):
    boxes = torch.randn(20, 9)
    boxes[:, 3:6] = boxes[:, 3:6].exp()
    torch.testing.assert_close(
        mini_cmt.boxes.decode_boxes(mini_cmt.boxes.encode_boxes(boxes)), boxes
    )


def test_unknown_velocity_costs_nothing(mini_cmt):
    targets = torch.zeros(2, 10)
    targets[1, 8:] = float("nan")
    loss = mini_cmt.losses.code_loss(torch.ones(2, 10), targets, torch.ones(10))
    assert loss == 18


def test_matching_finds_the_objects(mini_cmt):
    codes, logits = torch.randn(6, 10), torch.full((6, 3), -2.0)
    order = torch.tensor([4, 0, 5])
    queries, objects = mini_cmt.matching.hungarian_match(
        logits, codes, torch.tensor([0, 1, 2]), codes[order], 2.0, 0.25
    )
    assert {(int(q), int(o)) for q, o in zip(queries, objects)} == {(4, 0), (0, 1), (5, 2)}


def test_average_precision(mini_cmt):
    truth = {"boxes": [[0, 0, 0], [10, 0, 0]], "labels": [0, 0]}
    near = {"boxes": [[0.2, 0, 0], [11.5, 0, 0]], "scores": [0.9, 0.8], "labels": [0, 0]}

    def precision(predictions, threshold):
        frames = [{"ground_truth": truth, "predictions": predictions}]
        return mini_cmt.evaluation.average_precision(frames, 0, threshold)

    assert precision(near, 2.0) == 1.0
    assert precision(near, 1.0) == 0.5
    wrong_first = {**near, "scores": [0.8, 0.9]}
    assert precision(wrong_first, 1.0) == 0.25
    assert precision({"boxes": [], "scores": [], "labels": []}, 1.0) == 0.0
