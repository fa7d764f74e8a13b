"""Every attention and norm of Stable Diffusion: sizes, and the number of calls in a forward.

SD1.5 at 512x512 and SD2.1 at 768x768, batch 2 (one image with guidance: uncond and cond); the VAE
decodes one image of 512x512. A test counts them in the models.
"""

from bench.attention import Attention
from bench.group_norm import GroupNorm
from bench.transformer import Geglu, LayerNorm

CONTEXT = 77  # tokens of a prompt

SELF_ATTENTION = [
    Attention("SD1.5", 2, 8, 4096, 4096, 40, calls=5),
    Attention("SD1.5", 2, 8, 1024, 1024, 80, calls=5),
    Attention("SD1.5", 2, 8, 256, 256, 160, calls=5),
    Attention("SD1.5", 2, 8, 64, 64, 160, calls=1),
    Attention("SD2.1", 2, 5, 9216, 9216, 64, calls=5),
    Attention("SD2.1", 2, 10, 2304, 2304, 64, calls=5),
    Attention("SD2.1", 2, 20, 576, 576, 64, calls=5),
    Attention("SD2.1", 2, 20, 144, 144, 64, calls=1),
]
CROSS_ATTENTION = [shape._replace(keys=CONTEXT) for shape in SELF_ATTENTION]
VAE_ATTENTION = [Attention("VAE", 1, 1, 4096, 4096, 512, calls=1)]

BLOCKS = [(shape.model, shape.batch, shape.queries, shape.heads * shape.d, shape.calls)
          for shape in SELF_ATTENTION]  # transformer blocks: L, C, and their number
# Two of a block's three norms follow a residual sum: x + attention(x).
LAYER_NORMS = [LayerNorm(*sizes, calls * (1 + residual), residual)
               for *sizes, calls in BLOCKS for residual in (False, True)]
GEGLUS = [Geglu(*sizes, 4 * channels, calls) for *sizes, channels, calls in BLOCKS]

SIDES = {"SD1.5": 64, "SD2.1": 96}  # of the latent
UNET_NORMS = [  # channels, how often the side was halved, calls with SiLU, calls without
    (320, 0, 8, 5), (640, 0, 2, 0), (960, 0, 1, 0),
    (320, 1, 1, 0), (640, 1, 6, 5), (960, 1, 1, 0), (1280, 1, 1, 0), (1920, 1, 1, 0),
    (640, 2, 1, 0), (1280, 2, 6, 5), (1920, 2, 1, 0), (2560, 2, 2, 0),
    (1280, 3, 11, 1), (2560, 3, 3, 0),
]
VAE_NORMS = [  # channels, side, calls with SiLU, calls without
    (512, 64, 10, 1), (512, 128, 6, 0), (512, 256, 1, 0), (256, 256, 5, 0), (256, 512, 1, 0),
    (128, 512, 6, 0),
]

# For Triton's interpreter: every kernel and every branch of it, at sizes that take seconds.
TINY_ATTENTION = [
    Attention("tiny", 2, 2, 37, 37, 40, calls=2, packed=True),  # one tile, two pieces
    Attention("tiny", 1, 2, 20, 131, 40, calls=1),  # more than one tile, ragged
    Attention("tiny", 1, 1, 20, 37, 512, calls=1, packed=True),  # sliced
]
TINY_NORMS = [
    GroupNorm("tiny", 1, 6, 5, True, calls=2, groups=2),  # 3 channels a group: no power of two
    GroupNorm("tiny", 2, 6, 5, False, calls=1, channels_last=True, groups=2),
    GroupNorm("tiny", 1, 4, 91, True, calls=1, channels_last=True, groups=1),  # three launches
]
TINY_ROWS = [LayerNorm("tiny", 1, 7, 40, calls=1, residual=False),
             LayerNorm("tiny", 2, 5, 12, calls=1, residual=True), Geglu("tiny", 2, 5, 20, calls=1)]


def group_norms(model: str) -> list[GroupNorm]:
    """The GroupNorms of one forward of "SD1.5", "SD2.1" or "VAE", in NCHW."""
    if model == "VAE":
        batch, rows = 1, VAE_NORMS
    else:
        batch, rows = 2, [(c, SIDES[model] >> level, *calls) for c, level, *calls in UNET_NORMS]
    return [GroupNorm(model, batch, channels, side, silu, calls)
            for channels, side, *both in rows for silu, calls in zip((True, False), both) if calls]


def layouts(norms: list[GroupNorm]) -> list[GroupNorm]:
    """In channels_last, the only layout of the fused model, and in NCHW."""
    return [norm._replace(channels_last=last) for last in (True, False) for norm in norms]


def attentions(shapes: list[Attention]) -> list[Attention]:
    """With q, k and v apart, then in one projection."""
    return [shape._replace(packed=packed) for shape in shapes for packed in (False, True)]


def full() -> list:
    """All, the most important first: time may run out."""
    return [
        *attentions(SELF_ATTENTION[:1]), *attentions(CROSS_ATTENTION[:1]),
        *layouts(group_norms("SD1.5")), *LAYER_NORMS[:2], *GEGLUS[:1],
        *attentions(SELF_ATTENTION[1:]), *attentions(CROSS_ATTENTION[1:]), *VAE_ATTENTION,
        *LAYER_NORMS[2:], *GEGLUS[1:], *layouts(group_norms("SD2.1")), *layouts(group_norms("VAE")),
    ]


def sd1() -> list:
    """Those of an image by SD1.5."""
    return [case for case in full() if case.model in ("SD1.5", "VAE")]


def small() -> list:
    """Small enough for a CPU: SD1.5 at 16x16 and 8x8."""
    return [case for case in full() if case.model == "SD1.5" and case.pixels <= 256]


def tiny() -> list:
    """For Triton's interpreter."""
    return [*TINY_ATTENTION, *TINY_NORMS, *TINY_ROWS]
