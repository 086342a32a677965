"""The density of a policy's chunk [16, 4] against brute force: the Jacobian determinant of the discretised flow."""

import dataclasses

import numpy as np
import pytest
import tiny_dataset
import torch
from smooth_network import smooth_in_time

from pi0fm.data.columns.embodiment import Embodiment
from pi0fm.data.columns.norm_stats import NormStats, column_stats
from pi0fm.flow.config import FlowConfig
from pi0fm.flow.density import gaussian_log_prob
from pi0fm.flow.matching import FlowMatching
from pi0fm.flow.solver import integrate
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.local import LocalPolicy
from pi0fm.policy.sampling.scores import ScoreOptions, conditioned, observe_given
from pi0fm.policy.saved.bundle import PolicyConfig
from pi0fm_client.types import Observation


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("shapes_unchecked")
def test_the_exact_log_prob_of_a_chunk_is_the_jacobian_determinant_of_the_discretised_flow():
    """[16, 4] in a network of width [16, 5]: 64 entries, one more padded dimension, a delta action and different scales."""
    config = PolicyConfig(
        model=dataclasses.replace(tiny_dataset.network(), action_horizon=16),
        flow=FlowConfig(solver="rk4", num_flow_steps=24),  # 8 leave 3e-3, 16 1.4e-4: the quadrature, of order 4
        embodiment=Embodiment(cameras={"base": "observation.images.base"}, state_dim=4, robot_action_dim=4, delta_actions=(1,)),
    )
    random = np.random.default_rng(0)
    columns = [column_stats(random.normal(1, 2, (50, 4)).astype(np.float32), name) for name in ("state", "action")]
    torch.manual_seed(0)
    flow, model = FlowMatching.from_config(config.flow), Pi0(config.model)
    smooth_in_time(model)
    policy = LocalPolicy(model, flow, config.chain(NormStats(*columns, 50)), config.metadata(), torch.device("cpu"), torch.float32)
    picture = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    observation = Observation({"base": picture}, random.normal(size=4).astype(np.float32), "press")
    chunk = policy.infer_batch([observation], [3])[0].actions
    found = policy.log_prob([observation], [chunk], options=ScoreOptions(num_probes=0, float64=True))

    inputs, normal = observe_given(policy.chain, [observation], chunk[None])
    with torch.no_grad():
        cache = policy.model.encode_prefix(inputs)
    network = conditioned(policy.model.double(), cache, inputs.state)
    mask = torch.arange(5) < 4

    def backwards(entries):
        padded = torch.nn.functional.pad(entries.reshape(1, 16, 4), (0, 1))
        return integrate(lambda x, t: network(x, t) * mask, padded, flow.grid()[::-1], "rk4")[0, :, :4].reshape(-1)

    x_1 = normal[0, :, :4].reshape(-1).double()
    jacobian = torch.func.jacrev(backwards)(x_1)
    brute = gaussian_log_prob(backwards(x_1)[None], 1.0)[0] + torch.linalg.slogdet(jacobian).logabsdet
    assert jacobian.shape == (64, 64)
    assert float((jacobian - torch.eye(64)).abs().max()) > 0.05
    assert abs(found.log_prob[0] - float(brute)) < 1e-4
    assert abs(found.noise_norm[0] - float(backwards(x_1).norm())) < 1e-5
