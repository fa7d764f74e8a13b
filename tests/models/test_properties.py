"""Property-based tests of the schedule, the sizes and the name maps.

Those of settings in a PNG are in test_save.py.
"""

import torch
from hypothesis import given, settings as effort, strategies as st
from reference_models import ddim_step, error

from minisd import checks
from minisd.checkpoints import names
from minisd.config import ScheduleConfig, UNetConfig, VAEConfig
from minisd.models.ops import TORCH
from minisd.models.unet import UNet
from minisd.models.vae import VAE
from minisd.samplers import schedule

KINDS = st.sampled_from(["epsilon", "v_prediction"])
BETAS = st.floats(1e-5, 2e-2)
LATENT = torch.linspace(-3, 3, 8, dtype=torch.float64)
NOISE = torch.tensor([1, -2, 0.5, 0, 3, -0.1, 1e-3, -1], dtype=torch.float64)


@st.composite
def schedules(draw):
    """abar (alpha-bar) of a schedule with any betas."""
    low, high = sorted((draw(BETAS), draw(BETAS)))
    return schedule.alphas_cumprod(ScheduleConfig(beta_start=low, beta_end=high)).tolist()


@given(st.integers(1, 1000))
def test_timesteps_have_equal_strides_and_stay_in_range(steps):
    visited = [level.t for level in schedule.leading(steps, [0.5] * 1000)]
    assert len(visited) == steps and 0 <= visited[-1] <= 1 and visited[0] <= 999
    assert {a - b for a, b in zip(visited, visited[1:])} <= {1000 // steps}


@given(schedules())
def test_abar_falls_and_stays_between_0_and_1(alphas):
    assert 1 > alphas[0] and alphas[-1] > 0 and alphas == sorted(alphas, reverse=True)


@given(schedules(), KINDS, st.data())
def test_with_a_perfect_prediction_a_step_equals_add_noise(alphas, kind, data):
    """With the true eps or v, x after each step is x0 with the noise of that timestep."""
    visited = data.draw(st.lists(st.integers(0, 999), min_size=2, max_size=8, unique=True))
    first, *later = sorted(visited, reverse=True)
    abar, x = alphas[first], schedule.add_noise(LATENT, NOISE, alphas[first])
    for t in later:
        v = abar**0.5 * NOISE - (1 - abar) ** 0.5 * LATENT
        truth = NOISE if kind == "epsilon" else v
        x, abar = ddim_step(x, truth, abar, alphas[t], kind), alphas[t]
        assert error(x, schedule.add_noise(LATENT, NOISE, abar)) <= 1e-6


@given(schedules(), st.integers(0, 998), st.floats(0, 1))
def test_new_noise_replaces_predicted_noise(alphas, t, eta):
    """With any eta the variance of the noise is 1 - abar of the next timestep."""
    abar, abar_next = alphas[t + 1], alphas[t]
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    x = (1 - abar) ** 0.5 * one  # pure noise, of variance 1 - abar
    kept = ddim_step(x, one, abar, abar_next, "epsilon", eta, zero)
    new = ddim_step(x, one, abar, abar_next, "epsilon", eta, one) - kept
    assert error(kept**2 + new**2, one * (1 - abar_next)) <= 1e-9


@given(st.integers(-100, 2 * checks.MAX_SIDE), st.sampled_from([1, 4, 8, 16]))
def test_a_side_is_valid_or_the_nearest_are_named(value, multiple):
    try:
        assert checks.side("width", value, multiple, 1) == value
        assert value % multiple == 0 and value > 0
    except ValueError as caught:
        near = str(caught).partition("nearest valid: ")[2].rstrip(")").split(" or ")
        for other in map(int, near):
            assert checks.side("width", other, multiple, 1) == other
        assert min(abs(int(other) - value) for other in near) < multiple or not (
            multiple <= value <= checks.MAX_SIDE)


@st.composite
def configs(draw):
    """Models of any depth, with attention anywhere."""
    levels = draw(st.integers(1, 5))
    has = tuple(draw(st.lists(st.booleans(), min_size=levels, max_size=levels)))
    unet = UNetConfig(block_out_channels=(32,) * levels, has_attention=has, num_heads=(2,) * levels,
                      layers_per_block=draw(st.integers(1, 3)))
    vae = VAEConfig(block_out_channels=(32,) * draw(st.integers(1, 5)),
                    layers_per_block=draw(st.integers(1, 3)))
    return unet, vae


@effort(max_examples=30, deadline=None)
@given(configs())
def test_every_parameter_has_an_official_name(found):
    """One name in a UNet; at least one in a VAE, whose attention was published under several."""
    unet, vae = found
    with torch.device("meta"):
        parts = {"unet": UNet(unet, TORCH), "vae": VAE(vae, TORCH)}
    rows = {"unet": names.unet(unet), "vae": names.vae(vae)}
    for part, module in parts.items():
        ours = [name for tensors in rows[part].values() for name in tensors]
        assert module.state_dict().keys() <= set(ours)
        assert part == "vae" or len(ours) == len(set(ours))
