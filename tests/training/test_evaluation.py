"""Accuracy against brute force, and BatchNorm statistics."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import Fixed, ListLoader, toy_data, toy_loaders, toy_model

from taylor_pruning.errors import InputError
from taylor_pruning.tasks.dense import Regression
from taylor_pruning.training.evaluation import evaluate, mean_loss, reestimate_batchnorm


@pytest.mark.parametrize("classes", [3, 7])
def test_evaluate_equals_brute_force(classes):
    logits = torch.randn(23, classes, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(23) % classes
    model = Fixed(classes).train()
    accuracy = evaluate(model, ListLoader(logits[:, :, None, None], labels, 5), progress=False)
    ranks = [sorted(row.tolist(), reverse=True).index(row[label]) for row, label in zip(logits, labels, strict=True)]
    assert accuracy.images == 23
    assert accuracy.top1 == pytest.approx(100 * sum(r < 1 for r in ranks) / 23)
    assert accuracy.top5 == pytest.approx(100 * sum(r < min(5, classes) for r in ranks) / 23)
    assert accuracy.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item())
    assert model.training


def test_the_mean_loss_of_a_task_weighs_batches_by_their_samples():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(11, 4), torch.randn(11, 3)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    assert mean_loss(Regression(), model, batches) == pytest.approx((model(x) - y).square().mean().item())


def test_evaluate_uses_eval_mode_and_restores_every_mode():
    model = toy_model().train()
    model[1].eval()
    _, val = toy_loaders()
    before = copy.deepcopy(model.state_dict())
    assert evaluate(model, val, progress=False) == evaluate(model, val, progress=False)  # no dropout
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True, True, True]


def test_evaluate_names_what_is_wrong():
    model = toy_model()
    images, labels = toy_data()
    with pytest.raises(InputError, match="no images"):
        evaluate(model, ListLoader(images[:0], labels[:0], 4), progress=False)
    wrong = labels.clone()
    wrong[20] = 3
    with pytest.raises(InputError, match=r"batch 1 holds label 3.*3 outputs"):
        evaluate(model, ListLoader(images, wrong, 16), progress=False)
    wrong[20] = -1
    with pytest.raises(InputError, match="label -1"):
        evaluate(model, ListLoader(images, wrong, 16), progress=False)
    images[40, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="batch 2 holds NaN"):
        evaluate(model, ListLoader(images, labels, 16), progress=False)
    with pytest.raises(InputError, match=r"logits \[4, classes\]"):
        evaluate(model[:1], toy_loaders()[0], progress=False)
    with torch.no_grad():
        model[6].weight[0, 0] = math.inf
    with pytest.raises(InputError, match="6.weight"):
        evaluate(model, toy_loaders()[1], progress=False)


def test_reestimated_statistics_are_the_data_s():
    generator = torch.Generator().manual_seed(3)
    batches = [(torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64) + 2, None) for n in (8, 8, 2)]
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.3), nn.Dropout2d(0.9)).double().train()
    model[2].eval()
    model[1].running_mean.fill_(math.nan)
    reestimate_batchnorm(model, batches)
    images = torch.cat([images for images, _ in batches])
    torch.testing.assert_close(model[1].running_mean, images.mean((0, 2, 3)), rtol=1e-12, atol=0)
    variance = sum(len(batch) * batch.var((0, 2, 3), correction=1) for batch, _ in batches) / len(images)
    torch.testing.assert_close(model[1].running_var, variance, rtol=1e-12, atol=0)
    assert model[1].momentum == 0.3
    assert [module.training for module in model] == [True, True, False]
    with pytest.raises(InputError, match="no batches"):
        reestimate_batchnorm(model, [])
    batches[1][0][0, 0] = math.nan
    with pytest.raises(InputError, match="1.running_mean came out as NaN or Inf; look for broken images"):
        reestimate_batchnorm(model, batches)
