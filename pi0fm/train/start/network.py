"""The network that a run starts from, adapted, with its initial weights.

Owns: the order: layout on meta, adapt, shard, fill parameter by parameter. Does not know: optimisers, checkpoints.

    no bundle     each parameter a function of (seed, its name in a plain network): models/initial.py
    a bundle      its tensors, cast to the parameter's type; adapters, which no bundle holds, as without a bundle

No parameter is made twice, and tensors are copied one at a time. Of a sharded parameter a worker makes or reads only its rows.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch

from pi0fm.models.config import Pi0Config
from pi0fm.models.initial import distributions, fill
from pi0fm.models.lora import initial_adapter, is_adapter, plain_name
from pi0fm.models.pi0 import Pi0
from pi0fm.policy.saved import bundle
from pi0fm.policy.saved.weights import refuse_wrong_weights
from pi0fm.train.components import Adaptation
from pi0fm.train.parallel.sharding import local, local_rows
from pi0fm.train.start.adaptation import adapt
from pi0fm.train.start.pretrained import Pretrained


def starting_network(
    config: Pi0Config,
    how: Adaptation,
    seed: int,
    pretrained: Pretrained | None,
    computes: torch.dtype = torch.float32,
    device: torch.device | None = None,
    cut: Callable[[Pi0], None] = lambda network: None,
) -> Pi0:
    """Build an adapted network of `config` on `device` (the CPU by default). computes: the type of the products; cut: shards it in place.

    Raises ConfigError for an impossible adaptation, BundleError for a weights file that does not match its configuration.
    """
    with torch.device("meta"):
        model = Pi0(config)
        initial = distributions(model)
        adapt(model, how, computes)
    cut(model)
    model.to_empty(device=device or torch.device("cpu"))
    with bundle.open_weights(pretrained.path) if pretrained is not None else nullcontext() as weights:
        if weights is not None:
            refuse_wrong_weights(weights, config)
        for name, parameter in model.named_parameters():
            plain, held, rows = plain_name(name), local(parameter.detach()), local_rows(parameter)
            start = rows.start * math.prod(parameter.shape[1:])
            if is_adapter(name):
                fill(held, initial_adapter(name, parameter), seed, name, start)
            elif weights is None:
                fill(held, initial[plain], seed, plain, start)
            else:
                held.copy_(weights.rows(plain, rows).float())  # through float32: the bundle's type is independent of the run's
    return model
