"""Detection: divergence and directions of the heads, parts of detectors, a detector through the
pipeline."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSD

from EnhancedPruning import EnhancedPruning, InputError, PruningSettings, load_pruned, save_pruned
from taylor_pruning.repair.network import repair_network
from taylor_pruning.surgery.parts import PartsGraph, parts_of
from taylor_pruning.tasks.detection import Detection, _objectness
from taylor_pruning.tasks.task import flatten
from taylor_pruning.training.fine_tuning import Recipe


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())


def pyramid(outputs=8):
    body = nn.Sequential(block(3, 8), block(8, 8), block(8, 16))
    return BackboneWithFPN(body, {"1": "0", "2": "1"}, [8, 16], outputs)


class Maps(nn.Module):
    """Two maps without a pyramid, for SSD."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Sequential(block(3, 8), block(8, 8)), block(8, 8)
        self.out_channels = [8, 8]

    def forward(self, x):
        x = self.first(x)
        return {"0": x, "1": self.second(x)}


SIZES = {"min_size": 32, "max_size": 32}


def detector(kind):
    torch.manual_seed(0)
    one = AnchorGenerator(((8,), (16,), (24,)), ((1.0,),) * 3)
    if kind == "fasterrcnn":
        model = FasterRCNN(pyramid(), 3, rpn_anchor_generator=one, rpn_post_nms_top_n_test=20, rpn_post_nms_top_n_train=20,
                           **SIZES)  # fmt: skip
        model.roi_heads.box_head.fc6 = nn.Linear(8 * 49, 16)
        model.roi_heads.box_head.fc7 = nn.Linear(16, 16)
        model.roi_heads.box_predictor.cls_score = nn.Linear(16, 3)
        model.roi_heads.box_predictor.bbox_pred = nn.Linear(16, 12)
        return model
    if kind == "ssd":
        return SSD(Maps(), DefaultBoxGenerator([[2]] * 2), (32, 32), 3)
    if kind == "fcos":  # its heads normalise 32 groups
        return FCOS(pyramid(32), 3, anchor_generator=one, **SIZES)
    return RetinaNet(pyramid(), 3, anchor_generator=one, **SIZES)


def batch(images=4):
    generator = torch.Generator().manual_seed(0)
    corner = 16 * torch.rand(images, 2, 2, generator=generator)
    targets = [{"boxes": torch.cat([c, c + 12], 1), "labels": torch.tensor([1, 2])} for c in corner]
    return list(torch.rand(images, 3, 32, 32, generator=generator)), targets


KINDS = ("fasterrcnn", "retinanet", "fcos", "ssd")


@pytest.mark.parametrize("kind", KINDS)
def test_the_pruned_part_of_a_detector_keeps_the_law_and_the_whole_runs_trains_and_is_saved(kind, tmp_path):
    model, task, few = detector(kind).eval(), Detection(), batch(2)
    graph = PartsGraph(model, ["backbone"], lambda network: task.forward(network, few), 2)
    plan = graph.plan_of(range(0, len(graph.units), 3))
    gates = torch.ones(2, len(graph.units))
    gates[:, graph.units_of(plan)] = 0
    with torch.no_grad(), graph.gated(gates):
        closed = task.forward(model, few)["heads"]
    smaller = graph.remove(plan)
    with torch.no_grad():
        cut = task.forward(smaller, few)["heads"]
    torch.testing.assert_close(flatten(cut), flatten(closed), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in smaller.backbone.parameters()) < sum(p.numel() for p in model.backbone.parameters())
    save_pruned(tmp_path / "detector.pt", smaller)
    loaded = load_pruned(tmp_path / "detector.pt", factory=lambda: detector(kind))
    for found, again in zip(smaller(few[0]), loaded(few[0]), strict=True):
        torch.testing.assert_close(again, found)
    smaller.train()
    loss = task.loss(task.forward(smaller, few), few)
    loss.mean().backward()
    assert loss.shape == (2,) and all(p.grad is not None for p in smaller.backbone.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_random_directions_of_the_heads_have_the_curvature_of_the_divergence(kind):
    """Along one change of the outputs: its second difference against the mean square over many draws."""
    model, task, few = detector(kind).double().eval(), Detection(), batch(1)
    few = [image.double() for image in few[0]], few[1]
    with torch.no_grad():
        outputs = task.forward(model, few)
    generator = torch.Generator().manual_seed(1)
    step = 1e-3

    def moved(by):
        drawn = torch.Generator().manual_seed(2)
        shifted = [
            {
                k: v + by * torch.randn(v.shape, generator=drawn, dtype=v.dtype) if k != "softmax" else v
                for k, v in head.items()
            }
            for head in outputs["heads"]
        ]
        return {**outputs, "heads": shifted}

    wanted = (task.divergence(moved(step), outputs) + task.divergence(moved(-step), outputs)) / step**2
    count = flatten(outputs).shape[1]
    signs = [2.0 * torch.randint(2, (1, count), generator=generator) - 1 for _ in range(400)]

    def along(drawn):  # w.v is linear in the outputs, at directions of the unmoved ones
        with torch.enable_grad():
            heads = [
                {k: v.clone().requires_grad_() if k != "softmax" else v for k, v in h.items()} for h in outputs["heads"]
            ]
            leaves = [h[k] for h in heads for k in ("logits", "boxes")]
            w = torch.autograd.grad(task.projection({**outputs, "heads": heads}, drawn).sum(), leaves)
        v = [
            (m[k] - h[k]) / step
            for m, h in zip(moved(step)["heads"], outputs["heads"], strict=True)
            for k in ("logits", "boxes")
        ]
        return sum((a * b).sum() for a, b in zip(w, v, strict=True)).square()

    draws = torch.stack([along(drawn) for drawn in signs])
    assert abs(draws.mean() - wanted.item()) < 4 * draws.std() / len(draws) ** 0.5
    assert task.divergence(outputs, outputs).abs().max() < 1e-9


def answering(model):
    """The detector with weights by which its outputs depend on the image."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def test_a_detector_is_pruned_repaired_and_fine_tuned():
    loader = [batch(4), batch(4)]
    settings = PruningSettings(rounds=1, budget="params", prune_modules=["backbone", "head"], class_probes=2)
    options = {"task": Detection(), "settings": settings, "recipe": Recipe(epochs=1, lr=1e-3), "progress": False}
    model = answering(detector("retinanet"))
    pruning = EnhancedPruning(model, loader, loader, calibration_samples=6, **options)
    assert list(pruning.graph.parts) == ["backbone", "head"]
    result = pruning.run_full_pruning(30, 2)
    assert {"map", "map50", "loss"} <= result.stages[0].keys()
    dense, after = ({n: sum(p.numel() for p in getattr(m, n).parameters()) for n in ("backbone", "head")}
                    for m in (pruning.model, result.model))  # fmt: skip
    assert sum(after.values()) == pytest.approx(0.7 * sum(dense.values()), rel=0.1)
    last = result.rounds[-1]
    assert any(fit["name"].startswith("backbone.") for fit in last["compensation"]["layers"])
    assert last["measured_loss_change"] > 0


def test_a_detector_is_repaired_across_its_parts():
    """Images of two sizes, and so outputs of two."""
    model, task, loader = detector("retinanet").eval(), Detection(), [batch(2), batch(3)]
    answering(model)
    loader[1] = [image[:, :24] for image in loader[1][0]], loader[1][1]
    names = ["backbone", "head"]
    graph = PartsGraph(model, names, lambda network: task.forward(network, loader[0]), 2)
    smaller = graph.remove(graph.plan_of(range(0, len(graph.units), 4)))

    options = {"task": task, "parts": parts_of(graph), "passes": 6, "progress": False}
    report = repair_network(model, smaller, loader, [batch(6)], task.divergence, **options)
    assert report.loss_after < report.loss_before and report.images == 5 and report.held_out == 6


def test_what_cannot_be_traced_is_left_whole_and_named():
    loader = [batch(2)]
    settings = PruningSettings(rounds=1, prune_modules=["backbone", "roi_heads.box_head", "rpn"])
    pruning = EnhancedPruning(
        detector("fasterrcnn"), loader, loader, task=Detection(), settings=settings, progress=False
    )
    assert list(pruning.graph.parts) == ["backbone"]
    notes = " ".join(pruning.notes)
    assert "roi_heads.box_head is left whole" in notes and "rpn is left whole" in notes


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["back"], "no module back"),
        (["backbone", "backbone.body"], "lies in another"),
        (["rpn"], "no part of the network"),
    ],
)
def test_modules_that_cannot_be_pruned_are_refused_by_name(modules, message):
    loader = [batch(2)]
    with pytest.raises(InputError, match=message):
        EnhancedPruning(detector("fasterrcnn"), loader, loader, task=Detection(), progress=False,
                        settings=PruningSettings(prune_modules=modules))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, targets: (torch.stack(images), targets), "list of images"),
        (lambda images, targets: (images, targets[:1]), "one target an image"),
        (lambda images, targets: (images, [{"boxes": t["boxes"]} for t in targets]), "boxes \\[n, 4\\] and labels"),
        (lambda images, targets: (images, [t | {"boxes": t["boxes"].flip(1)} for t in targets]), "has no area"),
    ],
)
def test_batches_that_are_no_detection_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Detection().read(change(*batch(2)), "the first batch")


def test_the_background_is_no_object():
    """Class 0 of a head with a softmax; a head of independent classes has none."""
    logits = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 5.0, 3.0]]])
    softmax, independent = (_objectness({"logits": logits, "softmax": kind}) for kind in (True, False))
    torch.testing.assert_close(softmax, 1 - logits.softmax(2)[..., 0])
    torch.testing.assert_close(independent, logits.amax(2).sigmoid())


def test_no_images_and_networks_that_are_no_detectors_are_refused():
    with pytest.raises(InputError, match="detection: the loader gives no images to evaluate"):
        Detection().evaluate(detector("retinanet"), [])

    class Other(nn.Module):
        def forward(self, images, targets=None):
            return {}

    with pytest.raises(InputError, match="Other is no fasterrcnn, .* or fcos of torchvision; define a Task"):
        Detection().forward(Other().eval(), batch(1))
