"""IP-Adapters on a UNet (Ye et al., "IP-Adapter", 2023): at work for a forward, and gone after it.

diffusers loads an adapter into the UNet itself: other attention processors, and a projection of the pictures'
embeddings. Here both are taken out again and put in only for the rows of those who asked for them.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from safetensors import safe_open

from imagemesh_runtime.errors import FailedPrecondition, InvalidArgument, NotFound, shorten
from imagemesh_runtime.registry import Repository
from imagemesh_services.diffusion.backend import SampleInputs
from imagemesh_services.diffusion.references import NEGATIVE, POSITIVE, Reference
from imagemesh_services.fingerprint import fingerprint_of
from imagemesh_services.ip_adapters import IpAdapter, find_adapters
from imagemesh_services.torch_support import building, to_torch

_KEPT: Final = 4  # adapters that stay in memory also when nobody uses them
_PARTS: Final = ("image_proj", "ip_adapter")


@dataclass(frozen=True)
class _Weights:
    """An adapter's file as it was when it was looked for last.

    Attributes:
        state: tells whether the file has been replaced since.
    """

    adapter: IpAdapter
    state: tuple[int, int]
    fingerprint: str


def _weights_of(adapter: IpAdapter, known: _Weights | None) -> _Weights:
    """Read anew only if the file has changed."""
    about = adapter.path.stat()
    state = (about.st_mtime_ns, about.st_size)
    if known is not None and (known.adapter, known.state) == (adapter, state):
        return known
    return _Weights(adapter, state, fingerprint_of([adapter.path]))


@dataclass(frozen=True, eq=False)
class _Fitting:
    """What of a UNet an adapter replaces."""

    processors: Mapping[str, Any]
    projection: Any
    kind: str | None
    # What it is composed of, which stays in memory as long as it does.
    parts: tuple["_Fitting", ...] = ()

    @classmethod
    def of(cls, unet: Any) -> "_Fitting":
        projection, kind = unet.encoder_hid_proj, unet.config.encoder_hid_dim_type
        unet.encoder_hid_proj = None  # it may have attention processors of its own
        processors = dict(unet.attn_processors)
        unet.encoder_hid_proj = projection
        return cls(processors, projection, kind)

    @classmethod
    def composed(cls, parts: Sequence["_Fitting"], scales: Sequence[float]) -> "_Fitting":
        """Of an adapter each, as diffusers loads several: theirs are the weights, none is copied."""
        processors = {}
        for name, first in parts[0].processors.items():
            processors[name] = first
            if hasattr(first, "to_k_ip"):
                processors[name] = _beside([one.processors[name] for one in parts], scales)
        layers = [layer for one in parts for layer in one.projection.image_projection_layers]
        return cls(processors, MultiIPAdapterImageProjection(layers).eval(), parts[0].kind, tuple(parts))

    def put(self, unet: Any) -> None:
        unet.encoder_hid_proj = None
        unet.set_attn_processor(dict(self.processors))
        unet.encoder_hid_proj = self.projection
        unet.config.encoder_hid_dim_type = self.kind


def _beside(processors: Sequence[Any], scales: Sequence[float]) -> Any:
    """A processor with the keys and values of all, each counting as much as its scale says."""
    first, tokens = processors[0], [count for one in processors for count in one.num_tokens]
    with torch.device("meta"):  # it makes weights of its own, which are not wanted
        made = type(first)(first.hidden_size, first.cross_attention_dim, num_tokens=tokens, scale=list(scales))
    made.to_k_ip = torch.nn.ModuleList(layer for one in processors for layer in one.to_k_ip)
    made.to_v_ip = torch.nn.ModuleList(layer for one in processors for layer in one.to_v_ip)
    return made.eval()


@dataclass(frozen=True)
class Adapted:
    """Adapters' weights in order and how much each counts; those with the same are equal. It keeps them in memory."""

    told: tuple[tuple["_Weights", float], ...] = ()
    fitting: _Fitting | None = field(default=None, compare=False)


NOTHING: Final = Adapted()


class Adapters:
    """The adapters that a UNet can be given; every method but ``find`` is called on the lane."""

    def __init__(self, model: str, unet: Any, repository: Repository) -> None:
        self._model, self._unet, self._repository = model, unet, repository
        self._known: Mapping[str, IpAdapter] = {}
        self._weights: dict[str, _Weights] = {}
        self._fitted: WeakValueDictionary[_Weights, _Fitting] = WeakValueDictionary()
        self._latest: OrderedDict[_Weights, _Fitting] = OrderedDict()

    def find(self, names: Sequence[str]) -> list[str]:
        """Look on disk for adapters that ``prepare`` will be asked for; answers a fingerprint of each one's weights.

        Called on any thread but the lane, which has better to do than to read folders.

        Raises:
            NotFound: there is no such adapter.
        """
        if any(name not in self._known or not self._known[name].path.exists() for name in names):
            self._known = find_adapters(self._repository)
        for name in names:
            if name not in self._known:
                raise NotFound("IP-Adapter", name, self._known)
        for name in dict.fromkeys(names):
            self._weights[name] = _weights_of(self._known[name], self._weights.get(name))
        return [self._weights[name].fingerprint for name in names]

    def prepare(self, references: Sequence[Reference]) -> Adapted:
        """Load what these need, which was found before.

        Raises:
            NotFound: there is no such adapter.
            InvalidArgument: the embeddings aren't what the adapter is told.
            FailedPrecondition: its weights don't fit the model.
        """
        for i, one in enumerate(references):
            if one.adapter not in self._weights:
                raise NotFound("IP-Adapter", one.adapter, self._weights)
            adapter, shape = self._weights[one.adapter].adapter, one.positive.shape
            if shape[-1] != adapter.width or (len(shape) == 3) != adapter.hidden:
                wanted = f"[1, {'tokens, ' if adapter.hidden else ''}{adapter.width}] for {one.adapter}"
                raise InvalidArgument(f"references[{i}].embeds[{POSITIVE!r}].shape", list(shape), wanted)
        if not references:
            return NOTHING
        told = [(self._weights[one.adapter], one.scale) for one in references]
        parts = [self._fitting(weights) for weights, _ in told]
        with building():
            fitting = _Fitting.composed(parts, [scale for _, scale in told])
        return Adapted(tuple(told), fitting)

    @contextmanager
    def at_work(self, adapted: Adapted) -> Iterator[None]:
        """Around forwards of rows that have these."""
        if adapted.fitting is None:
            yield
            return
        usual = _Fitting.of(self._unet)
        try:
            adapted.fitting.put(self._unet)
            yield
        finally:
            usual.put(self._unet)

    def _fitting(self, weights: "_Weights") -> _Fitting:
        """The adapter's, in memory once however many use it."""
        fitting = self._fitted.get(weights)
        if fitting is None:
            fitting = self._fitted[weights] = self._load(weights.adapter)
        self._latest[weights] = fitting
        self._latest.move_to_end(weights)
        if len(self._latest) > _KEPT:
            self._latest.popitem(last=False)
        return fitting

    def _load(self, adapter: IpAdapter) -> _Fitting:
        usual = _Fitting.of(self._unet)
        try:
            with building():
                self._unet._load_ip_adapter_weights([read_weights(adapter)], low_cpu_mem_usage=False)
            fitting = _Fitting.of(self._unet)
        except (RuntimeError, KeyError, ValueError, IndexError) as error:
            raise FailedPrecondition(
                f"IP-Adapter {adapter.name} does not fit model {self._model}: {shorten(str(error))}"
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


def read_weights(adapter: IpAdapter) -> dict[str, dict[str, torch.Tensor]]:
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
