import itertools
import math

import pytest
import torch
from gaussian_mixture import GaussianMixture

from pi0fm.flow.checks import FlowError
from pi0fm.flow.config import PATHS, QUANTITIES, VELOCITY, FlowConfig
from pi0fm.flow.conversion import convert
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.path import path_named
from pi0fm.flow.stochastic import ancestral_grid, posterior, sample_ancestral, sample_sde, sde_grid
from pi0fm_client.errors import ConfigError

MEAN, SCALE = 1.5, 0.5


def flow_on(path, prediction=VELOCITY):
    return FlowMatching.from_config(FlowConfig(path=path, prediction=prediction))


def exact(flow):
    """The network that knows N(1.5, 0.25 I), answering what the flow's predictions are."""
    data = GaussianMixture(torch.tensor([[MEAN]]).double(), torch.ones(1).double(), SCALE)
    return lambda x, t: convert(flow.path, data.velocity(flow.path, x, t), x, t, VELOCITY, flow.prediction, check=False)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sde(flow, network, start, steps, **words):
    return sample_sde(flow, network, start, 1.0, steps, **words)


either = pytest.mark.parametrize("sampler", [sde, sample_ancestral])


@either
def test_masked_entries_stay_zero_and_change_nothing(sampler):
    flow = flow_on("cond_ot")
    mask = torch.tensor([[[True, False], [True, True]]]).expand(3, 2, 2)
    mix = noise(4, 4, seed=8) / 4

    def field(x, t):
        return (x.flatten(1) @ mix).reshape(x.shape)

    start, increments = noise(3, 2, 2), noise(40, 3, 2, 2, seed=3)
    found = sampler(flow, field, start, 40, increments=increments, mask=mask)
    start[~mask] = math.nan
    increments[:, ~mask] = math.nan
    assert torch.equal(found, sampler(flow, field, start, 40, increments=increments, mask=mask))
    assert (found[~mask] == 0).all()
    assert not torch.equal(found, sampler(flow, field, -found, 40, increments=increments, mask=mask))


@either
def test_a_generator_is_its_increments(sampler):
    flow = flow_on("ve")
    generator = torch.Generator().manual_seed(4)
    increments = torch.stack([torch.randn(4, 1, generator=generator, dtype=torch.float64) for _ in range(20)])
    found = sampler(flow, exact(flow), noise(4, 1), 20, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found, sampler(flow, exact(flow), noise(4, 1), 20, increments=increments))


@either
@pytest.mark.usefixtures("shapes_unchecked")
def test_bad_input_is_refused(sampler):
    flow = flow_on("cond_ot")
    field, start = exact(flow), noise(2, 1)
    with pytest.raises(ConfigError, match="needs randomness"):
        sampler(flow, field, start, 5)
    with pytest.raises(ConfigError, match="at least 1 step, found 0"):
        sampler(flow, field, start, 0, generator=torch.Generator())
    with pytest.raises(FlowError, match=r"increments must be of shape \[5, 2, 1\]"):
        sampler(flow, field, start, 5, increments=noise(4, 2, 1))
    with pytest.raises(FlowError, match="mask must be"):
        sampler(flow, field, start, 5, generator=torch.Generator(), mask=torch.ones(2, 1))
    with pytest.raises(FlowError, match="network's answer must have the state's shape"):
        sampler(flow, lambda x, t: x[:, 0], start, 5, generator=torch.Generator())
    with pytest.raises(FlowError, match="must be finite"):
        sampler(flow, lambda x, t: x * math.inf, start, 5, generator=torch.Generator())


def test_levels_and_orders_that_no_sde_has_are_refused():
    flow = flow_on("cond_ot")
    field, start = exact(flow), noise(2, 1)
    with pytest.raises(ConfigError, match="0 <= h < infinity"):
        sample_sde(flow, field, start, -1.0, 5, generator=torch.Generator())
    with pytest.raises(ConfigError, match="g is infinite where alpha is 0"):
        sample_sde(flow, field, start, 1.0, generator=torch.Generator(), times=[0.0, 0.5, 0.9])
    with pytest.raises(ConfigError, match="its grid must increase"):
        sample_sde(flow, field, start, 1.0, generator=torch.Generator(), times=[0.9, 0.5, 0.1])
    with pytest.raises(ConfigError, match="from noise to data"):
        posterior(flow.path, 0.5, 0.4)


@pytest.mark.parametrize("name", PATHS)
def test_the_grid_of_an_sde_is_uniform_in_the_log_ratio(name):
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
    # From the path's own p_0: VP and VE only approximate its mean by 0.
    zero = torch.zeros((), dtype=torch.float64)
    width = torch.sqrt(flow.path.sigma(zero) ** 2 + SCALE**2 * flow.path.alpha(zero) ** 2)
    start = (MEAN * flow.path.alpha(zero) + width * noise(4000, 1)) / flow.path.prior_scale
    samples = sample_sde(flow, exact(flow), start, h, 400 if h == 0 else 80, generator=torch.Generator().manual_seed(1))
    assert float(samples.mean()) == pytest.approx(MEAN, abs=5 * SCALE / math.sqrt(4000) + 0.02)
    assert float(samples.std()) == pytest.approx(SCALE, rel=0.08)


def test_h_zero_is_euler_on_the_same_grid():
    flow = flow_on("cond_ot")
    expected = flow.sample(exact(flow), noise(5, 1), times=sde_grid(flow, 20), solver="euler")
    torch.testing.assert_close(sample_sde(flow, exact(flow), noise(5, 1), 0.0, 20), expected)


def test_a_function_of_time_is_h_itself():
    flow, path, increments = flow_on("vp"), path_named("vp"), noise(30, 5, 1, seed=2)
    by_number = sample_sde(flow, exact(flow), noise(5, 1), 0.7, 30, increments=increments)
    by_function = sample_sde(
        flow, exact(flow), noise(5, 1), lambda t: 0.7 * float(path.diffusion(torch.tensor(t).double())), 30, increments=increments
    )
    torch.testing.assert_close(by_number, by_function, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("t", "r"), [(0.2, 0.25), (0.5, 0.9), (0.0, 0.3), (0.6, 1.0)])
def test_an_ancestral_step_is_the_conditional_of_the_joint_gaussian(name, t, r):
    """Given x_1, (x_r, x_t) is Gaussian with covariance a sigma_r^2: the conditional by the textbook formula."""
    path = path_named(name)
    alpha_t, alpha_r = path.alpha(torch.tensor([t, r], dtype=torch.float64)).tolist()
    var_t, var_r = path.sigma(torch.tensor([t, r], dtype=torch.float64)).square().tolist()
    covariance = alpha_t / alpha_r * var_r
    x_t, x_1 = 0.7, -1.3
    mean = alpha_r * x_1 + covariance / var_t * (x_t - alpha_t * x_1)
    from_state, from_data, variance = posterior(path, t, r)
    assert from_state * x_t + from_data * x_1 == pytest.approx(mean, abs=1e-12)
    assert variance == pytest.approx(var_r - covariance**2 / var_t, abs=1e-12)


def test_an_ancestral_step_on_the_vp_path_is_ddpm_s():
    """Equation 7 of arXiv 2006.11239, by the product of (1 - beta); beta-tilde is the variance."""
    path, num = path_named("vp"), 1000
    grid = ancestral_grid(flow_on("vp"), num)
    products = path.alpha(torch.tensor(grid, dtype=torch.float64)).square().tolist()
    for k in (0, 1, 400, 998):
        here, there = products[k], products[k + 1]
        beta = 1 - here / there
        from_state, from_data, variance = posterior(path, grid[k], grid[k + 1])
        assert from_state == pytest.approx(math.sqrt(1 - beta) * (1 - there) / (1 - here), rel=1e-9)
        assert from_data == pytest.approx(math.sqrt(there) * beta / (1 - here), rel=1e-9)
        assert variance == pytest.approx((1 - there) / (1 - here) * beta, rel=1e-9)
    # DDPM's schedule: rates beta from 1e-4 to 0.02, linear.
    betas = [1 - a / b for a, b in itertools.pairwise(products)]
    assert betas[0] == pytest.approx(0.02, rel=0.02)
    assert betas[-1] == pytest.approx(1e-4, rel=0.12)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("prediction", QUANTITIES)
@pytest.mark.parametrize("name", PATHS)
def test_ancestral_mean_and_variance_of_gaussian_data_converge_with_order_one(name, prediction):
    """On Gaussian data the sampler is affine in noise and increments, so its law follows from its answers to unit vectors."""
    flow = flow_on(name, prediction)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    start = torch.tensor([flow.interval()[0]], dtype=torch.float64)
    truth = SCALE**2 + float(flow.path.sigma(ends)[1]) ** 2
    # From the path's own law at the first time: VP and VE start N(0, .) only approximately.
    width = float(torch.sqrt(flow.path.sigma(start) ** 2 + SCALE**2 * flow.path.alpha(start) ** 2)) / flow.path.prior_scale
    centre = MEAN * float(flow.path.alpha(start)) / flow.path.prior_scale
    errors = []
    for steps in (50, 100):
        first = torch.full((steps + 2, 1), centre, dtype=torch.float64)
        first[1] += width
        increments = torch.zeros(steps, steps + 2, 1, dtype=torch.float64)
        increments[torch.arange(steps), torch.arange(steps) + 2] = 1
        answers = sample_ancestral(flow, exact(flow), first, steps, increments=increments)
        assert float(answers[0]) == pytest.approx(MEAN, abs=2e-3)
        errors.append(abs(float((answers[1:] - answers[0]).square().sum()) - truth))
    assert errors[1] < 0.15 * truth
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("prediction", QUANTITIES)
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("steps", [1, 7, 1000, 3000])
def test_the_ancestral_sampler_asks_within_the_interval_only(name, prediction, steps):
    flow = flow_on(name, prediction)
    grid = ancestral_grid(flow, steps)
    start, stop = flow.interval()
    assert len(grid) == steps + 1
    assert grid[0] == start
    assert grid[-1] == 1
    assert all(a < b for a, b in itertools.pairwise(grid))
    assert max(grid[:-1]) <= stop
    if steps < 1000:
        gaps = [b - a for a, b in itertools.pairwise(grid)]
        assert max(gaps) == pytest.approx(min(gaps))


def test_one_ancestral_step_answers_the_data_that_the_network_sees_in_noise():
    flow = flow_on("cond_ot")
    found = sample_ancestral(flow, exact(flow), noise(5, 1), 1, increments=noise(1, 5, 1))
    torch.testing.assert_close(found, torch.full_like(found, MEAN))
