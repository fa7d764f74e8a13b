"""Which timesteps and noise levels each spacing chooses, and what each sampler uses by default."""

import pytest
from official_samplers import ABARS, SPACINGS, STEPS, ladder_of, official

from minisd.samplers import SAMPLERS, WEB_UI, named, schedule, web_ui_name
from minisd.samplers.schedule import Level


def test_karras_levels():
    levels = SAMPLERS["dpmpp_2m"].ladder("karras", 10, ABARS).levels
    assert [level.ratio for level in levels] == pytest.approx(
        [14.6146, 9.1029, 5.4784, 3.1686, 1.7494, 0.9141, 0.4469, 0.2014, 0.0819, 0.0292, 0],
        abs=5e-5)
    assert [level.t for level in levels[:-1]] == pytest.approx(
        [999, 916.28, 815.04, 687.15, 523.20, 327.15, 145.94, 40.86, 6.73, 0], abs=5e-3)
    assert levels[-1] == Level(None, 1.0)


@pytest.mark.parametrize(("spacing", "steps", "expected"), [
    ("lcm", 1, [999]), ("lcm", 4, [999, 759, 499, 259]), ("lcm", 50, list(range(999, 0, -20))),
    ("linspace", 1, [999]), ("linspace", 2, [999, 0]), ("linspace", 4, [999, 666, 333, 0]),
    ("linspace", 5, [999, 749.25, 499.5, 249.75, 0]),
    ("karras", 1, [999]), ("exponential", 1, [999]),
    ("leading", 1, [1]), ("leading", 3, [667, 334, 1]),
    ("trailing", 1, [999]), ("trailing", 3, [999, 666, 332]),
])
def test_timesteps(spacing, steps, expected):
    levels = schedule.SPACINGS[spacing](steps, ABARS)
    assert [level.t for level in levels] == pytest.approx(expected, abs=1e-9)
    for level in levels:  # both ways between timestep and ratio
        assert schedule.at_timestep(level.t, ABARS).abar == pytest.approx(level.abar, rel=1e-12)
        assert schedule.at_ratio(level.ratio, ABARS).t == pytest.approx(level.t, abs=1e-9)


def test_lcm_has_50_timesteps():
    with pytest.raises(ValueError, match="at most 50 with spacing 'lcm', not 51"):
        schedule.ladder("lcm", 51, ABARS)
    assert [level.t for level in schedule.lcm(3, ABARS[:20])] == [19, 13, 6]  # of few timesteps
    with pytest.raises(ValueError, match="at most 20"):
        schedule.lcm(21, ABARS[:20])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("theirs", "spacing", "bound"), [
    ("EulerDiscreteScheduler", "leading", 1e-12), ("EulerDiscreteScheduler", "trailing", 1e-12),
    ("LCMScheduler", "lcm", 0), ("TCDScheduler", "lcm", 0),
    # Between two timesteps it interpolates the ratio, not its logarithm.
    ("EulerDiscreteScheduler", "linspace", 1e-4), ("EulerDiscreteScheduler", "karras", 1e-12),
    ("EulerDiscreteScheduler", "exponential", 1e-12),
])
def test_levels_are_diffusers(theirs, spacing, bound, steps):
    if steps == 1 and "linspace" in SPACINGS[spacing].values():
        return  # NumPy's linspace of 1 is its beginning: diffusers takes t = 0, almost no noise
    expected = ladder_of(official(theirs, steps, **SPACINGS[spacing])).levels
    levels = schedule.ladder(spacing, steps, ABARS).levels
    assert [level.t for level in levels[:-1]] == pytest.approx(
        [level.t for level in expected[:-1]], rel=1e-9, abs=1e-9)
    assert [level.abar for level in levels] == pytest.approx(
        [level.abar for level in expected], rel=bound)


def test_only_ddim_and_plms_end_at_timestep_0():
    for name, row in SAMPLERS.items():
        for spacing in schedule.SPACINGS:
            end = row.ladder(spacing, 4, ABARS)[-1]
            noisy = name in ("ddim", "plms") and spacing == "leading"
            assert end == Level(None, ABARS[0] if noisy else 1.0)


def test_what_each_sampler_uses_by_default():
    assert {name: (row.spacing, row.eta) for name, row in SAMPLERS.items()} == {
        "ddim": ("leading", 0), "euler": ("linspace", 0), "euler_a": ("linspace", 1),
        "ddpm": ("leading", 1), "dpmpp_2m": ("karras", 0), "dpmpp_2m_sde": ("karras", 1),
        "dpmpp_2s": ("karras", 0), "unipc": ("linspace", None), "heun": ("linspace", None),
        "lms": ("linspace", None), "plms": ("leading", None), "dpm2": ("linspace", 0),
        "lcm": ("lcm", None), "tcd": ("lcm", 0.3)}


def test_names_of_the_web_ui():
    for name, row in WEB_UI.items():
        own = SAMPLERS[row.sampler].eta
        eta = own if row.eta is None else row.eta
        assert named(name) == named(name.upper()) == row
        assert web_ui_name(row.sampler, row.spacing, eta) == name
    assert named("DPM++ 2M Karras") == ("dpmpp_2m", "karras", None)
    assert named("DPM2 a") == ("dpm2", "linspace", 1.0)
    assert named("dpm++ 2s a exponential") == ("dpmpp_2s", "exponential", 1.0)
    assert named("ddpm") == ("ddpm", "leading", None) and named("DPM fast") is None
    assert web_ui_name("dpmpp_2s", "karras", 0.0) is web_ui_name("euler", "leading", 0.0) is None
