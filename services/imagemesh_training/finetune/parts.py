"""Which parts of a classifier learn: a new head, and of the rest nothing, the last layers, additions, or all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from imagemesh_runtime.errors import InvalidArgument
from imagemesh_training.finetune.plan import Plan


def relabelled(model: Any, names: Sequence[str], seed: int) -> Any:
    """The model with a new head for these labels, float32; with its own head where it has just these.

    Raises:
        InvalidArgument: its head can't be told from the rest.
    """
    prefix = f"{model.base_model_prefix}."
    if model.base_model is model or not any(not name.startswith(prefix) for name, _ in model.named_parameters()):
        raise InvalidArgument("model", type(model).__name__, "a classifier with a head of its own")
    if list(model.config.id2label.values()) == list(names):
        return copy.deepcopy(model).float()
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(config).float()
    kept = {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}
    found = fresh.load_state_dict(kept, strict=False)
    assert not found.unexpected_keys
    assert not any(name.startswith(prefix) for name in found.missing_keys)
    return fresh


def layers_of(model: Any) -> nn.ModuleList:
    """The backbone's layers, first to last; of a hierarchical one such as Swin or ConvNeXt, its stages.

    Raises:
        InvalidArgument: it has none.
    """
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InvalidArgument("model", type(model).__name__, "a model of layers, to say which of them learn")
    # Those within are part of those around them, which come first.
    return max(lists, key=lambda module: sum(weight.numel() for weight in module.parameters()))


def made_to_learn(model: Any, plan: Plan) -> Any:
    """The model, with just the parameters that ``plan`` names set to learn; with low-rank additions, PEFT's around it.

    Raises:
        InvalidArgument: it has not so many layers, or no part that additions could be made to.
        ModuleNotFoundError: PEFT is needed and not installed.
    """
    model.requires_grad_(plan.tune == "all")
    if plan.tune == "last":
        _wake_last(model, plan.layers)
    wrapped = _with_additions(model, plan) if plan.tune == "lora" else model
    prefix = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        if not name.startswith(prefix):
            parameter.requires_grad_(True)
    if plan.checkpointing:
        _recompute(model)
    return wrapped


def _wake_last(model: Any, count: int) -> None:
    layers = layers_of(model)
    if not 1 <= count <= len(layers):
        raise InvalidArgument("layers", count, f"1 to {len(layers)} for this model")
    for layer in layers[-count:]:
        layer.requires_grad_(True)
    # What comes after them: a final norm, a pooler.
    children = list(model.base_model.children())
    (at,) = (i for i, child in enumerate(children) if any(module is layers for module in child.modules()))
    for child in children[at + 1 :]:
        child.requires_grad_(True)


def _with_additions(model: Any, plan: Plan) -> Any:
    from peft import LoraConfig, get_peft_model

    within = {id(module) for module in layers_of(model).modules()}
    inside = {name: module for name, module in model.named_modules() if id(module) in within}
    names = [name for name, module in inside.items() if isinstance(module, nn.Linear)]
    names = names or [name for name, module in inside.items() if isinstance(module, nn.Conv2d) and module.groups == 1]
    if not names:
        raise InvalidArgument("tune", "lora", "head, last or all for this model: it has no layers to add to")
    config = LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules=names, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return get_peft_model(model, config)


def merged(model: Any) -> Any:
    """The plain model again, with what was added to its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _recompute(model: Any) -> None:
    # The name before transformers 5.24.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InvalidArgument("checkpointing", True, f"false for this model: {error}") from error


def set_training(model: nn.Module) -> None:
    """Training mode for what learns; the rest is as in use: batch norms keep their statistics, nothing drops out."""
    model.train()
    _rest(model)


def _rest(module: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        module.eval()
        return
    for child in module.children():
        if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
            _rest(child)


def counts(model: nn.Module) -> tuple[int, int]:
    """Parameters that learn, and all."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a run must keep of the model: the parameters that learn, and the buffers, by name."""
    parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return {**parameters, **dict(model.named_buffers())}


@torch.no_grad()
def restore(model: nn.Module, kept: dict[str, torch.Tensor]) -> None:
    """Put back what ``learned`` gave.

    Raises:
        ValueError: it is another model's.
    """
    there = learned(model)
    if there.keys() != kept.keys() or any(there[name].shape != value.shape for name, value in kept.items()):
        raise ValueError("it is another model's")
    for name, value in there.items():
        value.copy_(kept[name])
