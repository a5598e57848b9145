"""The two ways to run an ensemble: each clone by itself, or all clones in one pass."""

import copy
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .ensemble import Ensemble, StateDict, frozen_modules, member, size, trained_state
from .folding import folded
from .nested import Inputs, each_tensor, num_rows, outputs_of, rows_of, tensors_of
from .runtime import Plan, Runtime, is_small, plan

# `warnings.catch_warnings` puts the filters of the whole process back. Of two trials that overlap
# in two threads, the later end would put back the filters of the other trial, which raise errors.
_TRIAL = threading.Lock()


class Lane(NamedTuple):
    """Clones that share a forward pass: all clones, or a single one."""

    module: nn.Module
    """Runs these clones."""
    leaves: list[Tensor]
    forward: Callable[[Inputs], Tensor]
    """`[k, B, ...]` -> outputs `[k, B, ...]`, float32, for the k clones of this lane."""
    read: Callable[[], Ensemble]
    """Return the present state of these clones, `[k, ...]`."""


def lanes(
    model: nn.Module,
    ensemble: Ensemble,
    inputs: Inputs,
    runtime: Runtime,
    *,
    training: bool,
    batch_size: int,
    num_samples: int,
) -> tuple[list[Lane], Plan]:
    """Put an ensemble on the device, in one lane or in one lane per clone, as planned.

    Args:
        inputs: `[N, ...]`, the data or a part of it.
        batch_size: size of every batch but the last of an epoch.
        num_samples: number of samples that will pass, over all clones and epochs.

    Returns:
        The lanes and the plan that they follow.
    """
    _check_names(model, ensemble)
    plan_for = partial(
        plan,
        model,
        inputs,
        num_clones=size(ensemble),
        num_samples=num_samples,
        training=training,
    )
    chosen = plan_for(runtime)
    two = rows_of(inputs, slice(2))
    if chosen.batch_clones:
        lane = _lane_of_all(model, ensemble, chosen, training)
        if runtime.batch_clones or _can_batch(lane, two, size(ensemble)):
            return [lane], chosen
        chosen = plan_for(replace(runtime, batch_clones=False))
    if chosen.workers > 1 and _draws_random_numbers(model, two):
        chosen = plan_for(replace(runtime, batch_clones=False, workers=1))
    fold_inputs = None if training or is_small(model) else two
    layout = _layout(model, two, chosen)
    return [
        _lane_of_one(
            model, member(ensemble, index), chosen, training, batch_size, fold_inputs, layout
        )
        for index in range(size(ensemble))
    ], chosen


def _check_names(model: nn.Module, ensemble: Ensemble) -> None:
    """Check that an ensemble has all that can be trained of a model, and nothing else than it."""
    missing = sorted(trained_state(model).keys() - ensemble.keys())
    unknown = sorted(ensemble.keys() - model.state_dict().keys())
    if missing or unknown:
        raise ValueError(
            f"ensemble: expected the model's tensors, missing {missing[:3]}, unknown {unknown[:3]}"
        )


def _can_batch(lane: Lane, inputs: Inputs, num_clones: int) -> bool:
    """Return whether vmap can run a model, by trying; it cannot run an LSTM or dropout.

    A model that holds another tensor afterwards, such as an average that is no buffer of its state
    dict, may go on from that tensor in its next pass. All clones would share it.

    For some operations, such as attention on a CPU, vmap runs one clone after the other, which
    takes longer than clones one by one. PyTorch warns about these, and they count as not possible.
    """
    module = lane.module
    if len(list(module.parameters())) != len(list(module.named_parameters(remove_duplicate=False))):
        return False  # the copies of tied weights would not stay equal
    held = _held(module)
    before = {name: tensor.clone() for name, tensor in lane.read().items()}
    try:
        with _TRIAL, torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", "There is a performance drop")
            lane.forward(repeated(inputs, num_clones))
    except (RuntimeError, UserWarning):
        return False
    now_held = _held(module)
    if len(now_held) != len(held) or any(new is not old for new, old in zip(now_held, held)):
        return False
    with torch.no_grad():  # the trial changed the statistics of batch normalisation
        for name, tensor in lane.read().items():
            tensor.copy_(before[name])
    return True


def _held(module: nn.Module) -> list[Tensor]:
    """Return the tensors that a model holds as buffers or plain attributes."""
    values = (
        value for part in module.modules() for value in (*part.buffers(False), *vars(part).values())
    )
    return [value for value in values if isinstance(value, Tensor)]


def repeated(inputs: Inputs, num_clones: int) -> Inputs:
    """Give every clone the same inputs: `[B, ...]` becomes `[num_clones, B, ...]`, as views."""
    return each_tensor(lambda tensor: tensor.expand(num_clones, *tensor.shape), inputs)


def _draws_random_numbers(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether a model draws from PyTorch's generator while it trains, as dropout does.

    Threads would share the generator, and the order of their draws would change from run to run.
    """
    probe = copy.deepcopy(model).to(tensors_of(inputs)[0].device).train()
    before = torch.default_generator.get_state()
    with torch.no_grad():
        outputs_of(probe, inputs)
    draws = not torch.equal(before, torch.default_generator.get_state())
    torch.default_generator.set_state(before)
    return draws


def _lane_of_one(
    model: nn.Module,
    params: StateDict,
    chosen: Plan,
    training: bool,
    batch_size: int,
    fold_inputs: Inputs | None,
    layout: torch.memory_format,
) -> Lane:
    """Put one clone on the device; with `fold_inputs`, fold its normalisation where possible."""
    module = _template(model, chosen, training)
    module.load_state_dict(params, strict=False)
    module.to(memory_format=layout)
    if fold_inputs is not None:
        module = folded(module, fold_inputs).to(memory_format=layout)
    # The shapes are static: the smaller last batch of an epoch runs uncompiled, because compiling
    # the model again for it would take longer.
    compiled = torch.compile(module, dynamic=False) if chosen.compile else module

    def run(inputs: Inputs) -> Tensor:
        x = each_tensor(lambda tensor: _in_layout(tensor[0], layout), inputs)
        runs = compiled if num_rows(x) == batch_size else module
        with _autocast(chosen):
            outputs = outputs_of(runs, x)
        return outputs.float().unsqueeze(0)

    def read() -> Ensemble:
        state = module.state_dict()
        return {name: state[name].detach().contiguous().unsqueeze(0) for name in params}

    return Lane(module, [p for p in module.parameters() if p.requires_grad], run, read)


def _lane_of_all(model: nn.Module, ensemble: Ensemble, chosen: Plan, training: bool) -> Lane:
    module = _template(model, chosen, training)
    state = {name: tensor.to(chosen.device, copy=True) for name, tensor in ensemble.items()}
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    leaves = [state[name].requires_grad_(training) for name in trained]

    def outputs_of_one(params: StateDict, x: Inputs) -> Tensor:
        given = dict(params)

        def call(*args: Inputs, **options: Inputs) -> Any:
            return functional_call(module, params, args, options)

        outputs = outputs_of(call, x)
        # A new tensor that the model has assigned to a buffer is now in `params`, which `vmap`
        # drops. Changes in place, such as those of batch normalisation, are in `state`.
        for name, tensor in given.items():
            if params[name] is not tensor:
                raise RuntimeError(
                    f"batch_clones: expected a model that changes {name} in place, got one that "
                    "assigns a new tensor to it"
                )
        return outputs

    outputs_of_all = vmap(outputs_of_one)

    def run(inputs: Inputs) -> Tensor:
        with _autocast(chosen):
            outputs: Tensor = outputs_of_all(state, inputs)
        return outputs.float()

    return Lane(
        module, leaves, run, lambda: {name: tensor.detach() for name, tensor in state.items()}
    )


def _in_layout(inputs: Tensor, layout: torch.memory_format) -> Tensor:
    """Store images `[B, C, H, W]` in this layout; other inputs stay as they are."""
    return inputs.contiguous(memory_format=layout) if inputs.dim() == 4 else inputs


def _layout(model: nn.Module, inputs: Inputs, chosen: Plan) -> torch.memory_format:
    """Choose how images and weights are stored: with the channels last where the model can run so.

    Convolutions are faster with the channels last. But a model that calls `view` on the output of a
    convolution, as the network of Flower's PyTorch app does, runs with the channels first only. The
    trial is in evaluation mode, so that nothing is drawn and no statistics change.
    """
    sizes = [tensor.dim() for tensor in (*model.parameters(), *model.buffers())]
    if 5 in sizes:  # weights of 3-D convolutions have another layout
        return torch.contiguous_format
    if 4 not in sizes and all(tensor.dim() != 4 for tensor in tensors_of(inputs)):
        return torch.channels_last  # nothing has channels
    module = _template(model, chosen, training=False).to(memory_format=torch.channels_last)
    devices = [chosen.device] * (torch.device(chosen.device).type == "cuda")
    two = each_tensor(lambda tensor: _in_layout(tensor, torch.channels_last), inputs)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), _autocast(chosen):
            outputs_of(module, two)
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def _autocast(chosen: Plan) -> torch.autocast:
    """Make the context in which a model runs.

    Autocast would keep the weights that it has cast until the outermost context ends. Inside a
    caller's autocast all steps would then use the weights of the first one.
    """
    device_type = torch.device(chosen.device).type
    return torch.autocast(device_type, torch.bfloat16, chosen.bf16, cache_enabled=False)


def _template(model: nn.Module, chosen: Plan, training: bool) -> nn.Module:
    """Copy a model to the device; its frozen parts never train, so that their buffers stay."""
    module = copy.deepcopy(model).to(chosen.device).train(training)
    for frozen in frozen_modules(module):
        frozen.eval()
    return module
