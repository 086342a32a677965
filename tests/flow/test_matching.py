import math

import pytest
import torch
from gaussian_mixture import GaussianMixture

from pi0fm.flow.checks import FlowError
from pi0fm.flow.config import DENSITIES, PATHS, QUANTITIES, SOLVERS, FlowConfig
from pi0fm.flow.conversion import convert
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.path import CondOT, path_named
from pi0fm.flow.time_density import Pi0Density, density_named
from pi0fm.options import decode, describe
from pi0fm_client.errors import ConfigError


def chunks(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


PI0 = FlowMatching(CondOT(), Pi0Density(), "euler", 10)


def test_pi0_s_training_pair_is_the_line_from_noise_to_actions():
    actions, noise, t = chunks(4, 5, 3), chunks(4, 5, 3, seed=1), torch.tensor([0.0, 0.25, 0.5, 1.0])
    pair = PI0.training_pair(actions, t, noise)
    assert torch.equal(pair.velocity_target, actions - noise)
    assert torch.equal(pair.target, pair.velocity_target)
    assert torch.equal(pair.x_t[0], noise[0])
    assert torch.equal(pair.x_t[3], actions[3])
    torch.testing.assert_close(pair.x_t[2], (actions[2] + noise[2]) / 2)


def test_times_are_a_function_of_one_uniform_number_each():
    u = torch.tensor([0.1, 0.9, 0.5])
    assert torch.equal(PI0.times(u)[[2, 0]], PI0.times(u[[2, 0]]))


def test_loss_is_the_sum_over_real_entries_and_their_count():
    velocity, target = chunks(2, 3, 2), chunks(2, 3, 2, seed=1)
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    mask[1, 2] = False
    total, count = PI0.loss(velocity, target, mask)
    expected = sum(float((velocity[b, h, a] - target[b, h, a]) ** 2) for b in range(2) for h in range(3) for a in range(2) if mask[b, h, a])
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert float(count) == 10
    assert total.ndim == count.ndim == 0
    assert float(PI0.mean_loss(velocity, target, mask)) == pytest.approx(expected / 10, rel=1e-6)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_masked_entries_change_neither_loss_nor_gradient(garbage):
    mask = chunks(2, 3, 2, seed=5) > 0
    results = []
    for filler in (0.0, garbage):
        velocity = torch.where(mask, chunks(2, 3, 2), torch.full((), filler)).requires_grad_(True)
        target = torch.where(mask, chunks(2, 3, 2, seed=1), torch.full((), -filler))
        total, count = PI0.loss(velocity, target, mask)
        total.backward()
        assert (velocity.grad[~mask] == 0).all()
        results.append((total, count, velocity.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_is_float32_and_is_summed_precisely(dtype):
    velocity = torch.full((1, 64, 64), 1.0, dtype=dtype)
    target = torch.zeros(1, 64, 64, dtype=torch.float32)
    total, count = PI0.loss(velocity, target, torch.ones(1, 64, 64, dtype=torch.bool))
    assert (total.dtype, count.dtype) == (torch.float32, torch.float32)
    assert (float(total), float(count)) == (4096, 4096)


def test_an_empty_batch_has_loss_zero_not_nan():
    x = chunks(2, 3, 2)
    assert float(PI0.mean_loss(x, 0 * x, torch.zeros_like(x, dtype=torch.bool))) == 0


def test_a_masked_training_pair_is_zero_where_sampling_holds_zero():
    actions, noise, mask = chunks(2, 3, 2), chunks(2, 3, 2, seed=1), chunks(2, 3, 2, seed=5) > 0
    actions[~mask] = math.nan
    pair = PI0.training_pair(actions, torch.tensor([0.3, 0.6]), noise, mask)
    assert (pair.x_t[~mask] == 0).all()
    assert (pair.target[~mask] == 0).all()
    assert torch.equal(pair.target[mask], (actions - noise)[mask])


@pytest.mark.parametrize("solver", SOLVERS)
def test_masked_entries_do_not_change_the_sample_of_the_rest(solver):
    """The field mixes every entry with every other, so that a leak would show."""
    weight = chunks(6, 6, dtype=torch.float64)

    def field(x, t):
        assert (x[~mask] == 0).all()
        return torch.tanh(x.flatten(1) @ weight + t[:, None]).reshape(x.shape)

    mask = chunks(2, 3, 2, seed=5) > 0
    noise = chunks(2, 3, 2, dtype=torch.float64)
    other = torch.where(mask, noise, torch.full((), math.nan, dtype=torch.float64))
    first = PI0.sample(field, noise, 5, solver, mask)
    assert torch.equal(first, PI0.sample(field, other, 5, solver, mask))
    assert (first[~mask] == 0).all()
    assert not torch.equal(first[mask], PI0.sample(lambda x, t: -x, noise, 5, solver, mask)[mask])


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("prediction", QUANTITIES)
@pytest.mark.parametrize("path", PATHS)
def test_a_network_may_predict_any_quantity(path, prediction):
    """The oracle, asked for each quantity, samples what it samples as a velocity on the same grid."""
    flow = FlowMatching.from_config(FlowConfig(path=path, prediction=prediction, num_flow_steps=40, solver="heun", time_margin=1e-2))
    mixture = GaussianMixture(torch.tensor([[[1.0, -1.0]], [[-1.0, 0.5]]]).double(), torch.tensor([0.5, 0.5]).double(), 0.3)

    def velocity(x, t):
        return mixture.velocity(flow.path, x, t)

    def network(x, t):
        return convert(flow.path, velocity(x, t), x, t, "velocity", prediction)

    noise = chunks(8, 1, 2, dtype=torch.float64)
    plain = FlowMatching.from_config(FlowConfig(path=path, solver="heun", time_margin=1e-2))
    expected = plain.sample(velocity, noise, times=flow.grid())
    torch.testing.assert_close(flow.sample(network, noise), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("prediction", QUANTITIES)
def test_the_target_of_a_pair_is_the_quantity_that_is_predicted(prediction):
    flow = FlowMatching.from_config(FlowConfig(path="vp", prediction=prediction))
    actions, noise, t = chunks(4, 5, 3), chunks(4, 5, 3, seed=1), torch.tensor([0.1, 0.25, 0.5, 0.9])
    pair = flow.training_pair(actions, t, noise)
    velocity = flow.path.conditional_velocity(noise, actions, t)
    torch.testing.assert_close(pair.target, convert(flow.path, velocity, pair.x_t, t, "velocity", prediction), rtol=1e-3, atol=1e-3)
    if prediction != "velocity":
        with pytest.raises(ConfigError, match="use target"):
            _ = pair.velocity_target


@pytest.mark.parametrize("prediction", QUANTITIES)
@pytest.mark.parametrize("density", ["uniform", "likelihood", "logit_normal"])
@pytest.mark.parametrize("path", PATHS)
def test_likelihood_weighting_measures_the_divergence_of_two_gaussians(path, density, prediction):
    """d/dt KL(p_t | q_t) = E||u_p - u_q||^2 / lam_t for two flows of one path; for N(m, s^2) and N(0, s^2) both sides are closed."""
    margin = 0.05
    flow = FlowMatching(
        path_named(path),
        density_named(density, path_named(path), margin),
        prediction=prediction,
        loss_weighting="likelihood",
        time_margin=margin,
    )
    t = flow.times((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    keep = t > (margin if prediction != "velocity" else 0)
    here, there = (GaussianMixture(torch.full((1, 1), m).double(), torch.ones(1).double(), 0.7) for m in (0.8, 0.0))
    x = torch.zeros(len(t), 1, dtype=torch.float64)
    inner = t.clamp(1e-9, 1 - 1e-9)
    answers = [convert(flow.path, data.velocity(flow.path, x, inner), x, inner, "velocity", prediction) for data in (here, there)]
    weighted = flow.mean_loss(answers[0], answers[1], keep[:, None], t) * keep.double().mean()
    ends = torch.tensor([margin if prediction != "velocity" else 0, 1 - margin], dtype=torch.float64)
    divergence = (flow.path.alpha(ends) * 0.8) ** 2 / (2 * (flow.path.sigma(ends) ** 2 + (flow.path.alpha(ends) * 0.7) ** 2))
    scale = flow.path.likelihood_integral(ends[1])
    if path == "ve":
        # alpha is 1 throughout, so p_0 already differs and nothing else changes the formula.
        assert float(divergence[0]) > 0
    assert float(weighted * scale) == pytest.approx(float(divergence[1] - divergence[0]), rel=0.01)


def test_likelihood_weights_are_one_on_average_and_one_exactly_under_their_own_density():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    uniform = FlowMatching.from_config(FlowConfig(time_density="uniform", loss_weighting="likelihood"))
    assert float(uniform.likelihood_weight(uniform.times(u)).mean()) == pytest.approx(1, abs=2e-2)
    own = FlowMatching.from_config(FlowConfig(time_density="likelihood", loss_weighting="likelihood"))
    torch.testing.assert_close(own.likelihood_weight(own.times(u)), torch.ones_like(u))
    assert float(uniform.likelihood_weight(torch.tensor([0.9995]))) == 0


def test_likelihood_weighting_needs_the_times():
    flow = FlowMatching.from_config(FlowConfig(loss_weighting="likelihood"))
    x = chunks(2, 3, 2)
    with pytest.raises(ConfigError, match="pass t_B to loss"):
        flow.loss(x, x, torch.ones_like(x, dtype=torch.bool))


@pytest.mark.usefixtures("shapes_unchecked")
def test_every_combination_of_words_trains_and_samples_finitely():
    x, noise, mask = chunks(8, 2, 2), chunks(8, 2, 2, seed=1), torch.ones(8, 2, 2, dtype=torch.bool)
    u = torch.linspace(0, 1 - 2**-24, 8)
    for path in PATHS:
        for density in DENSITIES:
            for prediction in QUANTITIES:
                flow = FlowMatching.from_config(
                    FlowConfig(path=path, time_density=density, prediction=prediction, loss_weighting="likelihood")
                )
                t = flow.times(u)[1:-1]
                pair = flow.training_pair(x[1:-1], t, noise[1:-1])
                total, _ = flow.loss(torch.zeros_like(pair.target), pair.target, mask[1:-1], t)
                assert math.isfinite(float(total)), (path, density, prediction)
                flow.sample(lambda x, t: 0 * x, noise, 4, "rk4")


def test_configuration_decodes_and_every_option_has_a_help_line():
    config = decode(FlowConfig, {"path": "vp", "prediction": "noise", "num_flow_steps": 25, "solver": "heun"})
    flow = FlowMatching.from_config(config)
    assert (flow.prediction, flow.num_flow_steps, flow.solver) == ("noise", 25, "heun")
    assert flow == FlowMatching.from_config(config)
    assert FlowMatching.from_config(FlowConfig()) == PI0
    assert all(text for _, _, text in describe(FlowConfig))


@pytest.mark.parametrize(
    ("tree", "rule"),
    [
        ({"path": "condot"}, "flow option path 'condot': did you mean 'cond_ot'"),
        ({"time_density": "beta"}, "time_density 'beta'.*pi0"),
        ({"solver": "eulr"}, "did you mean 'euler'"),
        ({"prediction": "eps"}, "prediction 'eps'.*noise"),
        ({"loss_weighting": "snr"}, "likelihood, none"),
        ({"num_flow_steps": 0}, "at least 1, found 0"),
        ({"time_margin": 0.5}, r"\(0, 0.5\), found 0.5"),
        ({"tolerance": 0.0}, "above 0"),
        ({"steps": 3}, "unknown option steps"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(tree, rule):
    with pytest.raises(ConfigError, match=rule) as caught:
        decode(FlowConfig, tree)
    assert "\n" not in str(caught.value)


def test_states_that_are_not_finite_are_refused_after_sampling():
    noise = chunks(2, 3, 2)
    noise[0, 0, 0] = math.nan
    with pytest.raises(FlowError, match="finite, found 1 entries"):
        PI0.sample(lambda x, t: -x, noise)
    assert PI0.sample(lambda x, t: -x, noise, check=False).isnan().sum() == 1


@pytest.mark.usefixtures("shapes_unchecked")
def test_mismatched_masks_and_shapes_are_refused():
    x = chunks(2, 3, 2)
    with pytest.raises(FlowError, match=r"mask must be torch.bool of shape \[2, 3, 2\].*found torch.float32"):
        PI0.loss(x, x, torch.ones(2, 3, 2))
    with pytest.raises(FlowError, match=r"found torch.bool \[2, 3\]"):
        PI0.sample(lambda x, t: x, x, mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(FlowError, match="prediction must have the state's shape"):
        PI0.loss(x[:1], x, torch.ones(2, 3, 2, dtype=torch.bool))
    with pytest.raises(FlowError, match="one for each state"):
        PI0.training_pair(x, torch.rand(3), x)
    with pytest.raises(FlowError, match="x_0 must have"):
        PI0.training_pair(x, torch.rand(2), x[:, :2])
    with pytest.raises(ConfigError, match="unknown solver 'ode45'"):
        PI0.sample(lambda x, t: x, x, solver="ode45")
