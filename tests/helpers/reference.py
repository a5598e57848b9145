"""Slow twins: the algorithm as in a textbook, one model and one term at a time.

Nothing here imports the engine, the losses or the core, so that a shared mistake is unlikely.
"""

import copy

import torch
from hypothesis import settings
from torch import nn
from torch.nn import functional as F

from flwr_cloned_kd.engine.ensemble import seeded
from flwr_cloned_kd.engine.recipe import Epoch, fold_in

few = settings(max_examples=20, deadline=None, derandomize=True)

# Two sums of the same numbers in another order differ by the rounding of float32, 6e-8 relative,
# which 20 steps amplify. The largest difference in 288 runs was 3e-6, for weights of about 1. A
# wrong step differs by 1e-3 or more. The models below are smooth, because at the kink of a ReLU
# rounding can switch a gradient off. No batch should have two samples, because BatchNorm then
# divides their difference by itself.
ROUNDING = 2e-5


def mlp(between=None, *, seed=1):
    between = nn.Identity() if between is None else between
    layers = [nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), between]
    return seeded(nn.Sequential(*layers, nn.Linear(8, 3)), seed)


def cnn(*, seed=1):
    first = [nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Tanh()]
    second = [nn.Conv2d(4, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.Tanh()]
    return seeded(nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(36, 3)), seed)


def images(num_samples, *, num_classes=3, seed=0):
    """Make a dataset of 8x8 grey images: noise around one pattern per class."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(num_classes, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num_samples) % num_classes
    noise = torch.randn(num_samples, 1, 8, 8, generator=generator)
    return patterns[labels] + noise, labels


def snapshot(params):
    return {name: tensor.detach().clone() for name, tensor in params.items()}


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def distance(left, right):
    """Return the largest absolute difference of two state dicts."""
    assert left.keys() == right.keys()
    return max((left[n].double() - right[n].double()).abs().max().item() for n in left)


def cross_entropy(logits, inputs, labels):
    return F.cross_entropy(logits, labels)


def epoch_batches(dataset, recipe, generator, epoch=0, view_seed=None):
    """Draw the batches of an epoch in the documented order.

    First a permutation, then all views of a finite augmentation, then in every batch another
    augmentation and the noise. With `view_seed` the views are drawn from that seed and the number
    of the epoch.
    """
    inputs, labels = dataset
    order = torch.randperm(len(inputs), generator=generator)
    views = None
    if hasattr(recipe.augment, "view"):
        if view_seed is not None:
            view_generator = torch.Generator().manual_seed(fold_in(view_seed, "views", epoch))
        views = recipe.augment.draw(len(inputs), generator if view_seed is None else view_generator)
    for rows in order.split(recipe.batch_size):
        if len(rows) == 1 and 1 < recipe.batch_size < len(inputs):
            continue
        x, y = inputs[rows], labels[rows]
        if views is not None:
            x = recipe.augment.view(x, views[rows])
        elif recipe.augment is not None:
            x = recipe.augment(x, generator)
        if recipe.label_noise is not None:
            y = recipe.label_noise(y, generator)
        yield x, y


def train(
    model,
    params,
    dataset,
    recipe,
    *,
    seed=0,
    clone=0,
    loss=cross_entropy,
    fused=False,
    history=(),
    view_seed=None,
):
    """Train one model by plain SGD with the draws of clone `clone`; return its state dict.

    The recipe may name another optimizer, a limit for the gradient, and steps instead of epochs.

    Args:
        fused: use PyTorch's fused kernel, which rounds a multiply-add once instead of twice.
        history: a list that receives the mean loss and accuracy of every epoch.
    """
    model = copy.deepcopy(model).train()
    model.load_state_dict(params)
    generator = torch.Generator().manual_seed(fold_in(seed, clone))
    start = [weight.detach().clone() for weight in model.parameters()]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if recipe.optimizer is None:
        optimiser = torch.optim.SGD(
            trained,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=fused,
        )
    else:
        optimiser = recipe.optimizer(trained, lr=recipe.lr)
    counting = torch.Generator().manual_seed(0)
    num_batches = len(list(epoch_batches(dataset, recipe, counting)))
    epochs, step = [], 0
    num_steps = recipe.steps or recipe.epochs * num_batches
    for epoch in range(num_steps):  # at least one step per epoch
        losses = correct = count = 0
        for x, y in epoch_batches(dataset, recipe, generator, epoch, view_seed):
            if step == num_steps:
                break
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr * recipe.schedule(step / num_steps)
            logits = model(x)
            value = objective = loss(logits, x, y)
            if recipe.proximal_mu:
                moved = zip(model.parameters(), start)
                squares = sum(((weight - origin) ** 2).sum() for weight, origin in moved)
                objective = value + recipe.proximal_mu / 2 * squares
            optimiser.zero_grad()
            objective.backward()
            if recipe.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
            optimiser.step()
            step += 1
            losses += value.item() * len(y)
            if logits.dim() == y.dim() + 1:  # classes
                correct += (logits.argmax(1) == y).sum().item()
            count += len(y)
        if not count:
            break
        epochs.append(Epoch(losses / count, correct / count))
        if recipe.stop is not None and recipe.stop(epochs):
            break
    if isinstance(history, list):
        history.extend(epochs)
    return snapshot(model.state_dict())


def divergences(
    logits, labels, teachers, weights, temperature, student_temperature=None, selection=None
):
    """Compute Eq. (2) with a separate term per divergence: `teachers[m][e]` are logits `[B, C]`.

    A selection multiplies the divergence of a sample by the weight of the sample.
    """
    divisor = temperature if student_temperature is None else student_temperature
    total = F.cross_entropy(logits, labels)
    for weight, ensemble in zip(weights, teachers):
        tempered = [F.softmax(teacher / temperature, dim=1) for teacher in ensemble]
        sample_weights = torch.ones(len(labels))
        if selection is not None:
            sample_weights = selection(sum(tempered) / len(tempered), labels)
        for target in tempered:
            terms = F.kl_div(F.log_softmax(logits / divisor, dim=1), target, reduction="none")
            divergence = (sample_weights * terms.sum(1)).mean()
            total = total + temperature**2 * weight / len(ensemble) * divergence
    return total


def phase2(
    model, core, memory, dataset, distillation, *, seed, weights=None, start=None, core_seed=0
):
    """Run Phase 2 as a plain loop that runs every teacher in every step.

    Args:
        memory: the ensembles of the teachers, tensors `[E, ...]`.
        start: the start of the student; None is the core.
    """
    weights = [1.0] * len(memory) if weights is None else list(weights)
    if distillation.mean_over_memory:
        weights = [weight / len(memory) for weight in weights]
    members = [
        [{name: tensor[e] for name, tensor in ensemble.items()} for e in range(_size(ensemble))]
        for ensemble in memory
    ]
    if distillation.core_as_teacher:
        members, weights = [*members, [core]], [*weights, 1.0]
    teachers = [[_loaded(model, params) for params in ensemble] for ensemble in members]

    def loss(logits, inputs, labels):
        with torch.no_grad():
            predictions = [[teacher(inputs) for teacher in ensemble] for ensemble in teachers]
        return divergences(
            logits,
            labels,
            predictions,
            weights,
            distillation.temperature,
            distillation.student_temperature,
            distillation.selection,
        )

    params = core if start is None else start
    return train(
        model,
        params,
        dataset,
        distillation.recipe,
        seed=seed,
        loss=loss,
        view_seed=fold_in(core_seed, "phase-2-views"),
    )


def _size(ensemble):
    return len(next(iter(ensemble.values())))


def _loaded(model, params):
    teacher = copy.deepcopy(model).eval()
    teacher.load_state_dict(params)
    return teacher
