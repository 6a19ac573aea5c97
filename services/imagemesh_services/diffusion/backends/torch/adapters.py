"""IP-Adapters on a UNet (Ye et al., "IP-Adapter", 2023): at work for a forward, and gone after it.

diffusers loads an adapter into the UNet itself: other attention processors, and a projection of the pictures'
embeddings. Here both are taken out again and put in only for the rows of those who asked for them.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from safetensors import safe_open

from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument, NotFound, shorten
from imagemesh_runtime.registry import Repository
from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.diffusion.references import NEGATIVE, POSITIVE, Reference
from imagemesh_services.ip_adapters import IpAdapter, find_adapters
from imagemesh_services.torch_support import building, to_torch

# Adapters in their order, and how much each counts.
Adapted = tuple[tuple[str, float], ...]
_KEPT: Final = 4  # sets of adapters in memory
_PARTS: Final = ("image_proj", "ip_adapter")


@dataclass(frozen=True)
class _Fitting:
    """What of a UNet an adapter replaces."""

    processors: Mapping[str, Any]
    projection: Any
    kind: str | None

    @classmethod
    def of(cls, unet: Any) -> "_Fitting":
        projection, kind = unet.encoder_hid_proj, unet.config.encoder_hid_dim_type
        unet.encoder_hid_proj = None  # it may have attention processors of its own
        processors = dict(unet.attn_processors)
        unet.encoder_hid_proj = projection
        return cls(processors, projection, kind)

    def put(self, unet: Any) -> None:
        unet.encoder_hid_proj = None
        unet.set_attn_processor(dict(self.processors))
        unet.encoder_hid_proj = self.projection
        unet.config.encoder_hid_dim_type = self.kind

    def weigh(self, scales: Sequence[float]) -> None:
        """As ``set_ip_adapter_scale``."""
        for processor in self.processors.values():
            if hasattr(processor, "to_k_ip"):
                processor.scale = list(scales)


class Adapters:
    """The adapters that a UNet can be given; every method is called on the lane."""

    def __init__(self, model: str, unet: Any, repository: Repository) -> None:
        self._model, self._unet, self._repository = model, unet, repository
        self._known: Mapping[str, IpAdapter] = {}
        self._fitted: OrderedDict[tuple[str, ...], _Fitting] = OrderedDict()

    def prepare(self, references: Sequence[Reference]) -> Adapted:
        """Load what these need.

        Raises:
            NotFound: there is no such adapter.
            InvalidArgument: the embeddings aren't what the adapter is told.
            FailedPrecondition: its weights don't fit the model.
        """
        if any(one.adapter not in self._known for one in references):
            self._known = find_adapters(self._repository)
        for i, one in enumerate(references):
            if one.adapter not in self._known:
                raise NotFound("IP-Adapter", one.adapter, self._known)
            adapter, shape = self._known[one.adapter], one.positive.shape
            if shape[-1] != adapter.width or (len(shape) == 3) != adapter.hidden:
                wanted = f"[1, {'tokens, ' if adapter.hidden else ''}{adapter.width}] for {one.adapter}"
                raise InvalidArgument(f"references[{i}].embeds[{POSITIVE!r}].shape", list(shape), wanted)
        if references:
            self._fitting(tuple(one.adapter for one in references))
        return tuple((one.adapter, one.scale) for one in references)

    @contextmanager
    def at_work(self, adapted: Adapted) -> Iterator[None]:
        """Around forwards of rows that have these."""
        if not adapted:
            yield
            return
        usual = _Fitting.of(self._unet)
        try:
            fitting = self._fitting(tuple(name for name, _ in adapted))
            fitting.weigh([scale for _, scale in adapted])
            fitting.put(self._unet)
            yield
        finally:
            usual.put(self._unet)

    def _fitting(self, names: tuple[str, ...]) -> _Fitting:
        if names not in self._fitted:
            self._fitted[names] = self._load([self._known[name] for name in names])
            if len(self._fitted) > _KEPT:
                self._fitted.popitem(last=False)
        self._fitted.move_to_end(names)
        return self._fitted[names]

    def _load(self, adapters: Sequence[IpAdapter]) -> _Fitting:
        usual = _Fitting.of(self._unet)
        try:
            with building():
                self._unet._load_ip_adapter_weights([_weights(one) for one in adapters], low_cpu_mem_usage=False)
            fitting = _Fitting.of(self._unet)
        except (RuntimeError, KeyError, ValueError, IndexError) as error:
            names = ", ".join(one.name for one in adapters)
            raise FailedPrecondition(
                f"IP-Adapter {names} does not fit model {self._model}: {shorten(str(error))}"
            ) from error
        finally:
            usual.put(self._unet)
        for module in (fitting.projection, *fitting.processors.values()):
            if isinstance(module, torch.nn.Module):
                module.eval().requires_grad_(False)
        return fitting


def conditions(inputs: SampleInputs, unet: Any, prompt: str) -> dict[str, torch.Tensor]:
    """What the adapters are told in the pass with the embeddings called ``prompt``, each [pictures, 1, ...]."""
    found = {}
    for i, one in enumerate(inputs.references):
        embeds = one.negative if prompt.startswith("negative_") else one.positive
        assert embeds is not None, f"checked: {NEGATIVE} is there with guidance"
        rows = to_torch(embeds, unet.device, unet.dtype).unsqueeze(0)
        found[f"{POSITIVE}.{i}"] = rows.repeat(len(inputs.seeds), *(1,) * (rows.dim() - 1))
    return found


def is_condition(name: str) -> bool:
    """Whether it is of those that ``conditions`` names."""
    return name.startswith(f"{POSITIVE}.")


def as_added(given: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """``added_cond_kwargs`` as the UNet takes them: the adapters' conditions in one list."""
    added: dict[str, Any] = {name: rows for name, rows in given.items() if not is_condition(name)}
    count = len(given) - len(added)
    if count:
        added[POSITIVE] = [given[f"{POSITIVE}.{i}"] for i in range(count)]
    return added


def _weights(adapter: IpAdapter) -> dict[str, dict[str, torch.Tensor]]:
    """As ``load_ip_adapter`` reads them."""
    found: dict[str, dict[str, torch.Tensor]] = {part: {} for part in _PARTS}
    with safe_open(adapter.path, framework="pt") as file:
        names = list(file.keys())
        for key in names:
            part, _, rest = key.partition(".")
            if "lora" in rest:
                raise ValueError("it brings LoRA weights for the UNet, which are not applied here")
            if part in found:
                found[part][rest] = file.get_tensor(key)
    return found
