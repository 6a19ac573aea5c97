"""The options that such clients read and set: few here, since a request brings its own."""

from dataclasses import dataclass
from typing import Any, Final

from imagemesh_gateway.access.caller import current_caller
from imagemesh_gateway.mesh import Mesh
from imagemesh_runtime.errors import InvalidArgument

# Options that clients set and that change nothing here, with what they are.
_FIXED: Final[dict[str, Any]] = {
    "samples_save": False,
    "samples_format": "png",
    "grid_save": False,
    "sd_vae": "Automatic",
    "sd_vae_as_default": True,
    "enable_pnginfo": True,
    "sd_checkpoint_hash": "",
    "outdir_samples": "",
    "outdir_txt2img_samples": "",
    "outdir_img2img_samples": "",
    "return_grid": False,
    "do_not_show_images": False,
    "send_seed": True,
    "send_size": True,
}
MODEL, CLIP = "sd_model_checkpoint", "CLIP_stop_at_last_layers"
_MAX_CLIP: Final = 12


@dataclass(frozen=True)
class _Chosen:
    model: str = ""
    clip: int = 1


class Options:
    """The model and the text encoder's layer that a tenant's requests get which name none, as long as the gateway
    runs."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._by_tenant: dict[str, _Chosen] = {}

    @property
    def _chosen(self) -> _Chosen:
        return self._by_tenant.get(current_caller().tenant, _Chosen())

    async def told(self) -> dict[str, Any]:
        """All options."""
        model = await self._mesh.catalogue.find(self._mesh.diffusion, self._chosen.model)
        return {MODEL: model.name, CLIP: self._chosen.clip, **_FIXED}

    async def set(self, options: dict[str, Any]) -> None:
        """Set some; all of them or, where one is wrong, none.

        Raises:
            NotFound: no such model.
            InvalidArgument: no such option, or not this value.
        """
        model, clip = self._chosen.model, self._chosen.clip
        for name, value in options.items():
            if name == MODEL:
                model = (await self._mesh.catalogue.find(self._mesh.diffusion, model_name(value))).name
            elif name == CLIP:
                clip = clip_layer(value)
            elif name not in _FIXED:
                raise InvalidArgument(name[:80], value, f"one of the options {', '.join([MODEL, CLIP, *_FIXED])}")
        self._by_tenant[current_caller().tenant] = _Chosen(model, clip)

    def overridden(self, settings: dict[str, Any]) -> tuple[str, int, list[str]]:
        """The model, the layer from the end (1 is the last), and what else was set and changes nothing."""
        model = model_name(settings[MODEL]) if settings.get(MODEL) else self._chosen.model
        clip = clip_layer(settings[CLIP]) if settings.get(CLIP) else self._chosen.clip
        return model, clip, sorted(set(settings) - {MODEL, CLIP})


def model_name(value: object) -> str:
    """A model's name as such clients send it: with a file's ending, or with its hash behind it."""
    if not isinstance(value, str):
        raise InvalidArgument(MODEL, value, "a model's name")
    return value.partition(" [")[0].removesuffix(".safetensors").removesuffix(".ckpt")


def clip_layer(value: object) -> int:
    """The text encoder's layer to take, counted from the end, from 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_CLIP:
        raise InvalidArgument(CLIP, value, f"0 to {_MAX_CLIP}")
    return max(value, 1)
