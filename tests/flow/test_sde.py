import math

import pytest
import torch

from pi0fm.flow.checks import FlowError
from pi0fm.flow.matching import FlowConfig, FlowMatching
from pi0fm.flow.oracle import GaussianMixture
from pi0fm.flow.path import PATHS, path_named
from pi0fm.flow.sde import sample_sde, sde_grid
from pi0fm_client.errors import ConfigError


def flow_on(path):
    return FlowMatching.from_config(FlowConfig(path=path))


def gaussian(flow):
    data = GaussianMixture(torch.tensor([[1.5]]).double(), torch.ones(1).double(), 0.5)
    return lambda x, t: data.velocity(flow.path, x, t)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", PATHS)
def test_the_grid_is_uniform_in_the_log_ratio(name):
    flow = flow_on(name)
    grid = torch.tensor(sde_grid(flow, 50), dtype=torch.float64)
    ratio = torch.log(flow.path.alpha(grid) / flow.path.sigma(grid))
    torch.testing.assert_close(ratio.diff(), ratio.diff().mean().expand(50), rtol=1e-6, atol=0)
    assert grid[0] == (0.001 if name in ("cond_ot", "cosine") else 0)
    assert grid[-1] == (1 if name == "ve" else 0.999)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("h", [0.0, 1.0, 1.6])
@pytest.mark.parametrize("name", PATHS)
def test_every_member_has_the_mean_and_variance_of_gaussian_data(name, h):
    flow = flow_on(name)
    field = gaussian(flow)
    # From the path's own p_0: VP and VE only approximate its mean by 0.
    zero = torch.zeros((), dtype=torch.float64)
    width = torch.sqrt(flow.path.sigma(zero) ** 2 + 0.25 * flow.path.alpha(zero) ** 2)
    start = (1.5 * flow.path.alpha(zero) + width * noise(4000, 1)) / flow.path.prior_scale
    samples = sample_sde(flow, field, start, h, 400 if h == 0 else 80, generator=torch.Generator().manual_seed(1))
    assert float(samples.mean()) == pytest.approx(1.5, abs=5 * 0.5 / math.sqrt(4000) + 0.02)
    assert float(samples.std()) == pytest.approx(0.5, rel=0.08)


def test_h_zero_is_euler_on_the_same_grid():
    flow = flow_on("cond_ot")
    grid = sde_grid(flow, 20)
    torch.testing.assert_close(
        sample_sde(flow, gaussian(flow), noise(5, 1), 0.0, 20), flow.sample(gaussian(flow), noise(5, 1), times=grid, solver="euler")
    )


def test_a_function_of_time_is_h_itself():
    flow = flow_on("vp")
    path = path_named("vp")
    increments = noise(30, 5, 1, seed=2)
    by_number = sample_sde(flow, gaussian(flow), noise(5, 1), 0.7, 30, increments=increments)
    by_function = sample_sde(
        flow, gaussian(flow), noise(5, 1), lambda t: 0.7 * float(path.diffusion(torch.tensor(t).double())), 30, increments=increments
    )
    torch.testing.assert_close(by_number, by_function, rtol=1e-6, atol=1e-6)


def test_masked_entries_stay_zero_and_change_nothing():
    flow = flow_on("cond_ot")
    mask = torch.tensor([[[True, False], [True, True]]]).expand(3, 2, 2)
    mix = noise(4, 4, seed=8) / 4

    def field(x, t):
        return (x.flatten(1) @ mix).reshape(x.shape)

    start, increments = noise(3, 2, 2), noise(40, 3, 2, 2, seed=3)
    found = sample_sde(flow, field, start, 1.0, 40, increments=increments, mask=mask)
    start[~mask] = math.nan
    increments[:, ~mask] = math.nan
    again = sample_sde(flow, field, start, 1.0, 40, increments=increments, mask=mask)
    assert torch.equal(found, again)
    assert (found[~mask] == 0).all()


def test_the_same_generator_gives_the_same_sample():
    flow = flow_on("cosine")
    one, two = (sample_sde(flow, gaussian(flow), noise(4, 1), 1.0, 20, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one, two)


def test_bad_input_is_refused():
    flow = flow_on("cond_ot")
    field, start = gaussian(flow), noise(2, 1)
    with pytest.raises(ConfigError, match="needs randomness"):
        sample_sde(flow, field, start, 1.0, 5)
    with pytest.raises(ConfigError, match="0 <= h < infinity"):
        sample_sde(flow, field, start, -1.0, 5, generator=torch.Generator())
    with pytest.raises(ConfigError, match="g is infinite where alpha is 0"):
        sample_sde(flow, field, start, 1.0, generator=torch.Generator(), times=[0.0, 0.5, 0.9])
    with pytest.raises(ConfigError, match="its grid must increase"):
        sample_sde(flow, field, start, 1.0, generator=torch.Generator(), times=[0.9, 0.5, 0.1])
    with pytest.raises(FlowError, match=r"increments must be of shape \[5, 2, 1\]"):
        sample_sde(flow, field, start, 1.0, 5, increments=noise(4, 2, 1))
    with pytest.raises(ConfigError, match="at least 1 step"):
        sde_grid(flow, 0)
