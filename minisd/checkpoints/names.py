"""Where every tensor of an official checkpoint belongs: tensor name -> parameter name, as data.

Our parameters have the names of the diffusers layout, so a folder needs only a few older spellings
beside the identity. A single file has the names of CompVis/latent-diffusion ("LDM"), which numbers
the UNet's blocks from first to last: ``input_blocks.4.0.in_layers.2.weight`` is our
``down_blocks.1.resnets.0.conv1.weight``. A map may list names that a model does not have (a bias,
a shortcut): the model itself says what must be there.
"""

import re
from collections.abc import Iterable

from minisd.config import Config, UNetConfig, VAEConfig

PARTS = ("text_encoder", "unet", "vae")

# A tensor's name -> the parameters it holds: one, or several stacked along the first axis.
NameMap = dict[str, tuple[str, ...]]


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",  # of latent consistency models
    "label_emb": "class_embedding",                      # of the x4 upscaler, a table
    "label_emb.0.0": "class_embedding.linear_1",         # of unCLIP models
    "label_emb.0.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_TRANSFORMER = _same(
    "norm",
    "proj_in",
    *(f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)),
    *(f"transformer_blocks.0.attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")),
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2",
    "proj_out",
)

VAE_ENDS = {
    **_same("quant_conv", "post_quant_conv"),
    **_same("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out"),
    "encoder.norm_out": "encoder.conv_norm_out",
    "decoder.norm_out": "decoder.conv_norm_out",
}
VAE_RESNET = {**_same("norm1", "conv1", "norm2", "conv2"), "nin_shortcut": "conv_shortcut"}
# There are three spellings: LDM's, that of the folders on the hub, and that of today's diffusers.
# Merging tools have carried the last one into LDM files too.
VAE_ATTENTION = {
    **{"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    **{"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"},
    **_same("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
}

CLIP_ENDS = _same(
    "embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm"
)
CLIP_LAYER = _same(
    "layer_norm1",
    *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
)
OPENCLIP_ENDS = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

# All that a single file holds under these prefixes belongs to that part, known or not.
SINGLE_FILE_PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
}
CLIP_PREFIXES = (
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.transformer.",  # old merges lack the inner prefix
    "conditioner.embedders.0.transformer.text_model.",
)
OPENCLIP_PREFIXES = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")

# What is left of training and no image needs. Each pattern matches a whole name.
DROPPED = (
    r"betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|denoiser\.sigmas|logvar",
    r"((first_stage_model\.|vae\.)?(model_ema|loss)|embedding_manager|optimizer(_states)?)\..*",
    r"global_step",
    # Always 0..76; merged files hold it as floats, in half precision, or wrong.
    r"(.*\.)?position_ids",
    r"(.*\.)?(logit_scale|text_projection|text_projection\.weight)",
    r"low_scale_model\..*",
    # Not weights but marks, see MARKERS.
    r"(model\.diffusion_model\.)?(v_pred|ztsnr)",
)

# Tensors, mostly empty, that say what the UNet predicts by being there: ComfyUI and others write
# them beside the UNet, some under its prefix. "ztsnr" is zero terminal SNR.
MARKERS = ("v_pred", "ztsnr")

# What torch.compile, DataParallel and DistributedDataParallel put into the names of what they wrap.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module)\.")

VAE_ALONE = "a VAE alone: give it as vae= (--vae), beside a model"
# What is not Stable Diffusion 1 or 2, by a name that only such files have.
REJECTED = {
    "a model with LoRA layers beside its own (save it with the LoRA merged)": r"\.base_layer\.",
    "quantised weights (save the model in float16 instead)":
        r"\.(scale_weight|weight_scale|absmax)$|quant_state\.|^scaled_fp8$",
    "an EDM model": r"^edm_(mean|std|vpred)\b",
    "LoRA weights": r"(^|[._])lora[._]",
    "a ControlNet": r"^(control_model|zero_convs|input_hint_block)\.|controlnet_cond_embedding\.",
    "an SDXL model": r"^conditioner\.embedders\.1\.",
    "a Flux model": r"(double_blocks|single_blocks|single_transformer_blocks)\.0\.",
    "the UNet alone of a diffusers folder (load the whole folder)": r"^time_embedding\.linear_1\.",
    "a UNet alone (give the whole model)": r"^(input_blocks\.0\.0|time_embed\.0)\.",
    VAE_ALONE: r"^(vae\.)?decoder\.conv_in\.",
    "a text encoder alone": r"^(text_model\.)?embeddings\.token_embedding\.",
}
# The same, by the number of channels that the UNet's first convolution reads.
REJECTED_INPUTS = {
    8: "an instruct-pix2pix model",
}
# And by the width of the class vector that it is told; unCLIP's have 1536 and 2048.
REJECTED_CLASSES = {2816: "an SDXL model", 2560: "the SDXL refiner"}


def unet(config: UNetConfig) -> NameMap:
    """LDM's names of a UNet, for any number of levels and of blocks per level."""
    rows, last, n = dict(UNET_ENDS), len(config.block_out_channels) - 1, config.layers_per_block
    for level, attends in enumerate(config.has_attention):
        down, up = f"down_blocks.{level}", f"up_blocks.{last - level}"
        first_in, first_out = 1 + level * (n + 1), (last - level) * (n + 1)
        places = [(f"input_blocks.{first_in + j}", down, j) for j in range(n)]
        places += [(f"output_blocks.{first_out + j}", up, j) for j in range(n + 1)]
        for place, ours, j in places:
            rows |= _under(f"{place}.0", f"{ours}.resnets.{j}", UNET_RESNET)
            if attends:
                rows |= _under(f"{place}.1", f"{ours}.attentions.{j}", UNET_TRANSFORMER)
        rows[f"input_blocks.{first_in + n}.0.op"] = f"{down}.downsamplers.0.conv"
        # The upsampler follows what its block has: a residual block, and attention or not.
        sampler = f"output_blocks.{first_out + n}.{2 if attends else 1}.conv"
        rows[sampler] = f"{up}.upsamplers.0.conv"
    rows |= _under("middle_block.0", "mid_block.resnets.0", UNET_RESNET)
    rows |= _under("middle_block.1", "mid_block.attentions.0", UNET_TRANSFORMER)
    rows |= _under("middle_block.2", "mid_block.resnets.1", UNET_RESNET)
    return _tensors(rows)


def vae(config: VAEConfig) -> NameMap:
    """LDM's names of a VAE. Its decoder numbers the levels from the full resolution, ours to it."""
    rows, last = dict(VAE_ENDS), len(config.block_out_channels) - 1
    for level in range(last + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{last - level}"
        for j in range(config.layers_per_block + 1):
            rows |= _under(f"encoder.down.{level}.block.{j}", f"{down}.resnets.{j}", VAE_RESNET)
            rows |= _under(f"decoder.up.{level}.block.{j}", f"{up}.resnets.{j}", VAE_RESNET)
        rows[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        rows[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    for half in ("encoder", "decoder"):
        mid = f"{half}.mid_block"
        rows |= _under(f"{half}.mid.block_1", f"{mid}.resnets.0", VAE_RESNET)
        rows |= _under(f"{half}.mid.attn_1", f"{mid}.attentions.0", VAE_ATTENTION)
        rows |= _under(f"{half}.mid.block_2", f"{mid}.resnets.1", VAE_RESNET)
    return _tensors(rows)


def clip(layers: int) -> NameMap:
    """transformers' names of a CLIP text model, which are ours."""
    rows = dict(CLIP_ENDS)
    for i in range(layers):
        rows |= _under(f"encoder.layers.{i}", f"encoder.layers.{i}", CLIP_LAYER)
    return _tensors(rows)


def openclip(layers: int) -> NameMap:
    """OpenCLIP's names of a text model, whose attention stacks the weights of q, k and v."""
    rows, stacks = dict(OPENCLIP_ENDS), {}
    for i in range(layers):
        theirs, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        rows |= _under(theirs, ours, OPENCLIP_LAYER)
        for end in ("weight", "bias"):
            qkv = tuple(f"{ours}.self_attn.{x}_proj.{end}" for x in "qkv")
            stacks[f"{theirs}.attn.in_proj_{end}"] = qkv
    position = {"positional_embedding": ("embeddings.position_embedding.weight",)}
    return _tensors(rows) | stacks | position


def single_file(config: Config) -> dict[str, NameMap]:
    """Part -> every name that its tensors may have in a single file."""
    layers = config.text.num_hidden_layers
    text: NameMap = {}
    for prefix in CLIP_PREFIXES:
        text |= _prefixed(prefix, clip(layers))
    open_text: NameMap = {}
    for prefix in OPENCLIP_PREFIXES:
        open_text |= _prefixed(prefix, openclip(layers))
    # The likelier names come first: an error calls a missing tensor by the first one.
    text = open_text | text if config.text.hidden_act == "gelu" else text | open_text
    return {
        "text_encoder": text,
        "unet": _prefixed("model.diffusion_model.", unet(config.unet)),
        "vae": _prefixed("first_stage_model.", vae(config.vae)),
    }


def folder(config: Config) -> dict[str, NameMap]:
    """Part -> every name that its tensors may have in that part's file of a diffusers folder."""
    text = clip(config.text.num_hidden_layers)
    return {
        "text_encoder": _prefixed("text_model.", text) | text,
        "unet": identity(unet(config.unet)),
        "vae": _diffusers_vae(config.vae),
    }


def stand_alone_vae(config: VAEConfig) -> NameMap:
    """Every name that a VAE's tensors may have in a file of their own."""
    names = vae(config) | _diffusers_vae(config)
    return {prefix + name: ours for prefix in VAE_PREFIXES for name, ours in names.items()}


def dropped(config: Config) -> re.Pattern:
    """Matches the whole name of a tensor that no image needs.

    OpenCLIP's last layer is one: Stable Diffusion 2 reads the output of the layer before it.
    """
    layer = rf"transformer\.resblocks\.{config.text.num_hidden_layers}\..*"
    unused = f"({'|'.join(OPENCLIP_PREFIXES)}){layer}"
    return re.compile("|".join((*DROPPED, unused)))


def markers(names: Iterable[str]) -> list[str]:
    """Those of MARKERS that are among the names of a single file."""
    there = {name.removeprefix("model.diffusion_model.") for name in names}
    return [marker for marker in MARKERS if marker in there]


def unwrapped(name: str) -> str:
    """A tensor's name without what torch puts into it where a module is wrapped."""
    return WRAPPERS.sub("", name)


def rejected(names: list[str]) -> str | None:
    """What a file with tensors of these names is, if it is a known thing that minisd rejects."""
    lines = "\n".join(names)
    return next((what for what, row in REJECTED.items() if re.search(row, lines, re.M)), None)


def _diffusers_vae(config: VAEConfig) -> NameMap:
    names = identity(vae(config))
    for half in ("encoder", "decoder"):
        mid = f"{half}.mid_block.attentions.0"
        names |= _tensors(_under(mid, mid, VAE_ATTENTION))
    return names


def identity(names: NameMap) -> NameMap:
    """The names where each parameter has its own, unstacked."""
    return {ours: (ours,) for parameters in names.values() for ours in parameters}


def _prefixed(prefix: str, names: NameMap) -> NameMap:
    return {prefix + name: parameters for name, parameters in names.items()}


def _under(official: str, ours: str, pieces: dict[str, str]) -> dict[str, str]:
    return {f"{official}.{theirs}": f"{ours}.{own}" for theirs, own in pieces.items()}


def _tensors(layers: dict[str, str]) -> NameMap:
    """Layer names to tensor names: each layer has a weight, and most have a bias."""
    return {
        f"{official}.{end}": (f"{ours}.{end}",)
        for official, ours in layers.items()
        for end in ("weight", "bias")
    }
