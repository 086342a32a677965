import math

import pytest
import torch

from pi0fm.flow.checks import FlowError
from pi0fm.flow.config import SOLVERS, STOCHASTIC_SOLVERS, FlowConfig
from pi0fm.flow.density import SOLVER_BESIDE_NOISE, DensityOptions, log_prob, push_backward
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.sampling import SAMPLERS, num_increments, overridden, sample
from pi0fm.flow.stochastic import sample_ancestral, sample_sde
from pi0fm.flow.time_density import LogitNormal
from pi0fm.options import decode
from pi0fm_client.errors import ConfigError


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def field(x, t):
    return torch.tanh(x.flip(1)) - x * t.reshape(-1, 1, 1)


def flow(**options):
    return FlowMatching.from_config(FlowConfig(num_flow_steps=6, **options))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_of_the_ode_is_flow_matching_s_own(solver):
    found = sample(flow(solver=solver), field, noise(2, 3, 2))
    assert torch.equal(found, flow().sample(field, noise(2, 3, 2), 6, solver))
    assert num_increments(flow(solver=solver)) == 0


def test_a_stochastic_word_is_its_sampler():
    increments = noise(6, 2, 3, 2, seed=1)
    noisy = flow(solver="euler_maruyama", noise_level=0.5)
    expected = sample_sde(noisy, field, noise(2, 3, 2), 0.5, 6, increments=increments)
    assert torch.equal(sample(noisy, field, noise(2, 3, 2), increments=increments), expected)
    assert torch.equal(sample(flow(), field, noise(2, 3, 2), solver="ancestral", increments=increments),
                       sample_ancestral(flow(), field, noise(2, 3, 2), 6, increments=increments))  # fmt: skip
    assert num_increments(noisy) == num_increments(flow(), solver="ancestral") == 6
    assert num_increments(noisy, 9) == 9


@pytest.mark.parametrize("solver", SAMPLERS)
def test_masked_entries_change_no_sampler(solver):
    mask = torch.tensor([True, False]).expand(2, 3, 2)
    start, increments = noise(2, 3, 2), noise(6, 2, 3, 2, seed=1)
    found = sample(flow(), field, start, mask, solver=solver, increments=increments)
    start[~mask], increments[:, ~mask] = math.nan, math.nan
    assert torch.equal(found, sample(flow(), field, start, mask, solver=solver, increments=increments))
    assert (found[~mask] == 0).all()


def test_what_no_sampler_can_do_is_refused():
    with pytest.raises(ConfigError, match=r"unknown solver 'euler_mayurama': did you mean 'euler_maruyama'.*ancestral"):
        sample(flow(), field, noise(1, 3, 2), solver="euler_mayurama")
    for solver in STOCHASTIC_SOLVERS:
        with pytest.raises(ConfigError, match="needs randomness"):
            sample(flow(solver=solver), field, noise(1, 3, 2))
        with pytest.raises(ConfigError, match="draws random numbers and solves no ODE"):
            flow().sample(field, noise(1, 3, 2), solver=solver)
        with pytest.raises(ConfigError, match="solves no ODE"):
            log_prob(flow(), field, noise(1, 3, 2), options=DensityOptions(solver=solver))


@pytest.mark.parametrize("solver", STOCHASTIC_SOLVERS)
def test_a_flow_that_samples_with_noise_has_the_density_of_its_ode(solver):
    found = push_backward(flow(solver=solver), field, noise(2, 3, 2))
    expected = push_backward(flow(solver=SOLVER_BESIDE_NOISE), field, noise(2, 3, 2))
    assert torch.equal(found.log_prob, expected.log_prob)


def test_one_probe_is_the_same_with_and_without_a_gradient():
    """Two implementations: plain autograd where no gradient is wanted, torch.func elsewhere."""
    probes = torch.sign(noise(1, 2, 3, 2, seed=3))
    tracked = push_backward(flow(), field, noise(2, 3, 2), options=DensityOptions(probes=probes))
    with torch.no_grad():
        plain = push_backward(flow(), field, noise(2, 3, 2), options=DensityOptions(probes=probes))
        constant = push_backward(flow(), lambda x, t: torch.ones_like(x), noise(2, 3, 2), options=DensityOptions(probes=probes))
    torch.testing.assert_close(plain.log_prob, tracked.log_prob)
    torch.testing.assert_close(plain.noise, tracked.noise)
    assert not plain.log_prob.requires_grad
    torch.testing.assert_close(constant.noise, noise(2, 3, 2) - 1)
    with torch.inference_mode(), pytest.raises(FlowError, match=r"found torch.inference_mode; use torch.no_grad"):
        push_backward(flow(), field, noise(2, 3, 2), options=DensityOptions(probes=probes))


def test_overriding_keeps_the_rest_and_drops_a_noise_level_that_nothing_would_read():
    config = FlowConfig(solver="euler_maruyama", noise_level=0.3, num_flow_steps=50, path="vp")
    assert overridden(config) == config
    assert overridden(config, 20).noise_level == 0.3
    assert overridden(config, solver="heun") == FlowConfig(solver="heun", num_flow_steps=50, path="vp")
    assert overridden(FlowConfig(), solver="euler_maruyama", noise_level=0.0).noise_level == 0
    with pytest.raises(ConfigError, match="noise_level belongs to solver euler_maruyama"):
        overridden(config, solver="heun", noise_level=0.3)


def test_logit_normal_takes_its_constants_from_the_configuration():
    config = decode(FlowConfig, {"time_density": "logit_normal", "logit_normal_mu": 0.7, "logit_normal_s": 0.5})
    assert FlowMatching.from_config(config).time_density == LogitNormal(0.7, 0.5)
    assert FlowMatching.from_config(FlowConfig(time_density="logit_normal")).time_density == LogitNormal()


@pytest.mark.parametrize(
    ("tree", "rule"),
    [
        ({"logit_normal_mu": 0.7}, "belong to time_density logit_normal, found 0.7 and 1.0 with pi0"),
        ({"time_density": "uniform", "logit_normal_s": 2.0}, "found 0.0 and 2.0 with uniform"),
        ({"time_density": "logit_normal", "logit_normal_s": 0.0}, "finite mu and s > 0"),
        ({"noise_level": 0.5}, "belongs to solver euler_maruyama, found 0.5 with euler"),
        ({"solver": "ancestral", "noise_level": 0.5}, "found 0.5 with ancestral"),
        ({"solver": "euler_maruyama", "noise_level": -1.0}, "0 or more, found -1"),
        ({"solver": "euler_maruyama", "noise_level": float("inf")}, "noise_level must be a finite number, found inf"),
        ({"solver": "ancestrall"}, "did you mean 'ancestral'"),
    ],
)
def test_options_that_nothing_would_read_are_refused_in_one_line(tree, rule):
    with pytest.raises(ConfigError, match=rule) as caught:
        decode(FlowConfig, tree)
    assert "\n" not in str(caught.value)
