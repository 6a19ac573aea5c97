"""The families with a transformer in the UNet's place, as data: flow-matching models that diffusers has blocks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from imagemesh_services.diffusion.backend import Wants
from imagemesh_services.diffusion.backends.torch.calls import CallForm


@dataclass(frozen=True)
class FlowFamily:
    """A row of the table.

    Attributes:
        pipelines: diffusers' classic pipelines, by which a folder says that it is of the family.
        transformer: diffusers' class of the model.
        blocks: diffusers' modular blocks; their workflows say what is run.
        form: how the model takes rows.
        widths: which of the model's settings says how wide a tensor of the conditioning is.
        tokens: how long the embeddings of an ordinary prompt are.
        packed: whether four latents are one of the model's tokens before it sees them.
        keeps_norm: whether the blocks give the guided prediction the norm of the unguided one, which zeros can't have.
        lists: whether embeddings are a list of rows to the blocks, each of its own length.
        guider: settings of the guider besides its scale.
        steps, guidance: what diffusers' classic pipeline takes where nothing is said.
    """

    name: str
    pipelines: Sequence[str]
    transformer: str
    blocks: str
    wants: Wants
    form: CallForm
    widths: Mapping[str, str]
    tokens: int
    packed: bool
    steps: int
    guidance: float
    keeps_norm: bool = False
    lists: bool = False
    guider: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def channels(self, transformer: Mapping[str, Any]) -> int:
        """Channels of a latent, by the model's configuration."""
        channels: int = transformer["in_channels"]
        return channels // 4 if self.packed else channels


FAMILIES: Final = (
    FlowFamily(
        name="sd3",
        pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        transformer="SD3Transformer2DModel",
        blocks="StableDiffusion3AutoBlocks",
        wants=Wants(("prompt_embeds", "pooled_prompt_embeds"), changing=False),
        form=CallForm("hidden_states"),
        widths={"prompt_embeds": "joint_attention_dim", "pooled_prompt_embeds": "pooled_projection_dim"},
        tokens=333,
        packed=False,
        steps=28,
        guidance=7.0,
    ),
    FlowFamily(
        name="flux",
        pipelines=("FluxPipeline", "FluxImg2ImgPipeline"),
        transformer="FluxTransformer2DModel",
        blocks="FluxAutoBlocks",
        wants=Wants(("prompt_embeds", "pooled_prompt_embeds"), negative=False, changing=False),
        # Where tokens and patches stand, which is the same for all rows of one size.
        form=CallForm("hidden_states", shared=frozenset({"txt_ids", "img_ids"})),
        widths={"prompt_embeds": "joint_attention_dim", "pooled_prompt_embeds": "pooled_projection_dim"},
        tokens=512,
        packed=True,
        steps=28,
        guidance=3.5,
    ),
    FlowFamily(
        name="qwen-image",
        pipelines=("QwenImagePipeline", "QwenImageImg2ImgPipeline"),
        transformer="QwenImageTransformer2DModel",
        blocks="QwenImageAutoBlocks",
        wants=Wants(("prompt_embeds", "prompt_embeds_mask"), equal=False, changing=False),
        form=CallForm(
            "hidden_states",
            ragged=frozenset({"encoder_hidden_states", "encoder_hidden_states_mask"}),
        ),
        widths={"prompt_embeds": "joint_attention_dim"},
        tokens=64,
        packed=True,
        steps=50,
        guidance=4.0,
        keeps_norm=True,
    ),
    FlowFamily(
        name="z-image",
        pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline"),
        transformer="ZImageTransformer2DModel",
        blocks="ZImageAutoBlocks",
        wants=Wants(("prompt_embeds",), equal=False, changing=False),
        form=CallForm("x", ragged=frozenset({"cap_feats"})),
        widths={"prompt_embeds": "cap_feat_dim"},
        tokens=64,
        packed=False,
        steps=50,
        guidance=5.0,
        lists=True,
        # The classic pipeline adds the difference to the prediction, where others begin at the negative one.
        guider=MappingProxyType({"use_original_formulation": True}),
    ),
)


def family_of(transformer: str) -> FlowFamily | None:
    """The family of a model by its class; None: it is of none of these."""
    return next((one for one in FAMILIES if transformer == one.transformer), None)
