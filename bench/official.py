"""The official models, built from minisd's configs, to test minisd and to time it beside them.

Parameters have the same names in both, so that a strict load_state_dict copies the weights.
"""

import diffusers
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from minisd.config import ScheduleConfig, TextConfig, UNetConfig, VAEConfig


def official_unet(config: UNetConfig, side: int = 8) -> UNet2DConditionModel:
    """``side``: of the latent, by default."""
    kinds = ["CrossAttn" if on else "" for on in config.has_attention]
    return UNet2DConditionModel(
        sample_size=side, in_channels=config.in_channels, out_channels=config.out_channels,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in kinds[::-1]],
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        # In the official configs this key holds the number of heads.
        attention_head_dim=config.num_heads, cross_attention_dim=config.cross_attention_dim,
        use_linear_projection=config.use_linear_projection,
        norm_num_groups=config.norm_num_groups,
    )


def official_vae(config: VAEConfig) -> AutoencoderKL:
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels, norm_num_groups=config.norm_num_groups,
        scaling_factor=config.scaling_factor,
    )


def official_text_encoder(config: TextConfig) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size, hidden_act=config.hidden_act,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,  # as in the published configs; unused
    ))


def official_scheduler(config: ScheduleConfig) -> DDIMScheduler:
    """DDIM as in the published scheduler_config.json files."""
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps, beta_start=config.beta_start,
        beta_end=config.beta_end, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=config.prediction_type,
    )


def quiet() -> None:
    """No log messages and progress bars between the tables."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
