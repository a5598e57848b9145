"""The two ways to run an ensemble: every clone by itself, or all of them in one pass."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .ensemble import Ensemble, StateDict, member, size
from .folding import channels_last, folded
from .runtime import Plan, Runtime, is_small, plan


class Lane(NamedTuple):
    """Clones that share a forward pass: all of them, or a single one."""

    leaves: list[Tensor]
    forward: Callable[[Tensor], Tensor]
    """`[k, B, ...]` -> logits `[k, B, C]`, float32, for the k clones of this lane."""
    read: Callable[[], Ensemble]


def lanes(
    model: nn.Module,
    ensemble: Ensemble,
    inputs: Tensor,
    runtime: Runtime,
    *,
    training: bool,
    batch_size: int,
    num_samples: int,
) -> tuple[list[Lane], Plan]:
    """Put an ensemble on the device, in the way that the plan for it says.

    Args:
        inputs: `[N, ...]`, the data or some of it.
        batch_size: of all passes but the last of an epoch.
        num_samples: that will pass, all clones and epochs counted.
    """
    decide = partial(
        plan,
        model,
        inputs,
        num_clones=size(ensemble),
        num_samples=num_samples,
        training=training,
    )
    chosen = decide(runtime)
    if chosen.batch_clones:
        together = _together(model, ensemble, chosen, training)
        if runtime.batch_clones or _can_batch(model, together, inputs[:2], size(ensemble)):
            return [together], chosen
        chosen = decide(replace(runtime, batch_clones=False))
    each = [member(ensemble, index) for index in range(size(ensemble))]
    shown = None if training or is_small(model) else inputs[:2]
    return [_alone(model, params, chosen, training, batch_size, shown) for params in each], chosen


def _can_batch(model: nn.Module, lane: Lane, inputs: Tensor, num_clones: int) -> bool:
    """Try what vmap cannot do (an LSTM, dropout): it says so at the first call."""
    if len(list(model.parameters())) != len(list(model.named_parameters(remove_duplicate=False))):
        return False  # tied weights would come apart
    before = {name: tensor.clone() for name, tensor in lane.read().items()}
    try:
        with torch.no_grad():
            lane.forward(inputs.expand(num_clones, *inputs.shape))
    except RuntimeError:
        return False
    with torch.no_grad():  # the statistics of batch normalisation have moved
        for name, tensor in lane.read().items():
            tensor.copy_(before[name])
    return True


def _alone(
    model: nn.Module,
    params: StateDict,
    chosen: Plan,
    training: bool,
    batch_size: int,
    shown: Tensor | None,
) -> Lane:
    module = _template(model, chosen, training)
    module.load_state_dict(params)
    channels_last(module)
    if shown is not None:
        module = folded(module, shown)
    # Static shapes: the smaller last batch of an epoch runs uncompiled instead of compiling anew.
    compiled = torch.compile(module, dynamic=False) if chosen.compile else module

    def run(inputs: Tensor) -> Tensor:
        x = inputs[0]
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        call = compiled if len(x) == batch_size else module
        with torch.autocast(x.device.type, torch.bfloat16, enabled=chosen.bf16):
            logits: Tensor = call(x)
        return logits.float().unsqueeze(0)

    def read() -> Ensemble:
        return {n: t.detach().contiguous().unsqueeze(0) for n, t in module.state_dict().items()}

    return Lane([p for p in module.parameters() if p.requires_grad], run, read)


def _together(model: nn.Module, ensemble: Ensemble, chosen: Plan, training: bool) -> Lane:
    module = _template(model, chosen, training)
    state = {name: tensor.to(chosen.device, copy=True) for name, tensor in ensemble.items()}
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    leaves = [state[name].requires_grad_(training) for name in trained]

    def one(params: StateDict, x: Tensor) -> Tensor:
        logits: Tensor = functional_call(module, params, (x,))
        return logits

    call = vmap(one)

    def run(inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=chosen.bf16):
            logits: Tensor = call(state, inputs)
        return logits.float()

    return Lane(leaves, run, lambda: {name: tensor.detach() for name, tensor in state.items()})


def _template(model: nn.Module, chosen: Plan, training: bool) -> nn.Module:
    return copy.deepcopy(model).to(chosen.device).train(training)
