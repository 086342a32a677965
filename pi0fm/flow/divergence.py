"""The divergence of a velocity field, exactly or by random probes.

Owns: `div v = trace(dv/dx)` for every state of a batch, and the probes. Does not know: paths, time, solvers.

    exact        D vector-Jacobian products, one for each entry of a state, vectorised with torch.func.vmap
    Hutchinson   n of them: mean of e' J e over Rademacher probes e (+1 or -1); Chen et al. 2018 (arXiv 1806.07366), FFJORD
                 (arXiv 1810.01367); unbiased, variance 2 (||J_sym||_F^2 - sum diag^2) / n with J_sym = (J + J') / 2

Shape letters: B batch, D entries of one state.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import vjp, vmap

from pi0fm.flow.checks import FlowError
from pi0fm_client.errors import ConfigError

Field = Callable[[Tensor], Tensor]


def exact_divergence(
    field: Field, x: Float[Tensor, "B *rest"], entries: Sequence[int] | None = None, chunk_size: int | None = None
) -> tuple[Float[Tensor, "B *rest"], Float[Tensor, " B"]]:
    """(v(x), div v(x)).

    field: treats the states of a batch apart, as every network in evaluation mode does.
    entries: positions in a flattened state where v is not constantly 0; all of them by default. Padding costs nothing then.
    chunk_size: how many products run at once; memory grows with it. None runs all of them.
    """
    value, pullback = _value_and_pullback(field, x)
    width = x[0].numel()
    positions = torch.arange(width, device=x.device) if entries is None else torch.tensor(list(entries), dtype=torch.long, device=x.device)
    rows = torch.nn.functional.one_hot(positions, width).to(x.dtype)
    if not len(positions):
        return value, x.new_zeros(x.shape[0])
    each: Tensor = vmap(lambda row: _quadratic(pullback, row.reshape(1, *x.shape[1:]).expand_as(x)), chunk_size=chunk_size)(rows)
    return value, each.sum(0)


def hutchinson_divergence(
    field: Field, x: Float[Tensor, "B *rest"], probes: Float[Tensor, "n B *rest"]
) -> tuple[Float[Tensor, "B *rest"], Float[Tensor, " B"]]:
    """(v(x), estimate of div v(x)): the mean of `e' J e` over the probes; one forward pass, one backward pass a probe."""
    if len(probes) == 1 and not torch.is_grad_enabled():
        return _by_one_backward_pass(field, x, probes[0])
    value, pullback = _value_and_pullback(field, x)
    if len(probes) == 1:
        # Without vmap a single probe runs on any kernel that has a backward pass.
        return value, _quadratic(pullback, probes[0])
    each: Tensor = vmap(lambda probe: _quadratic(pullback, probe))(probes)
    return value, each.mean(0)


def rademacher_probes(
    num_probes: int, like: Float[Tensor, "B *rest"], generator: torch.Generator, mask: Bool[Tensor, "B *rest"] | None = None
) -> Float[Tensor, "n B *rest"]:
    """`num_probes` probes of +1 and -1 for every state of `like`, 0 where the mask is False; drawn from `generator` alone.

    Raises ConfigError for less than one probe.
    """
    if num_probes < 1:
        raise ConfigError(f"Hutchinson's estimate needs at least 1 probe, found {num_probes}; leave probes out for the exact divergence")
    bits = torch.randint(0, 2, (num_probes, *like.shape), generator=generator, device=generator.device)
    probes = (2 * bits - 1).to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return probes if mask is None else torch.where(mask, probes, torch.zeros_like(probes))


def _by_one_backward_pass(field: Field, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """The same by plain autograd, for a caller that wants no gradient: torch.func runs custom autograd functions on a slower path.

    Raises FlowError under torch.inference_mode, where every derivative would silently be 0.
    """
    if torch.is_inference_mode_enabled():
        raise FlowError("a divergence needs derivatives, found torch.inference_mode; use torch.no_grad")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        value = field(leaf)
    if not value.requires_grad:  # a field that does not read its state
        return value, x.new_zeros(x.shape[0])
    (pulled,) = torch.autograd.grad(value, leaf, probe, allow_unused=True, materialize_grads=True)
    return value.detach(), (pulled * probe).flatten(1).sum(1)


def _value_and_pullback(field: Field, x: Tensor) -> tuple[Tensor, Field]:
    """v(x), and the map from a cotangent e to e' J. A lambda: a nested function would be annotated anew at every step under test."""
    result = vjp(field, x)
    return result[0], lambda cotangent: result[1](cotangent)[0]


def _quadratic(pullback: Field, probe: Tensor) -> Tensor:
    """e' J e for each state."""
    return (pullback(probe) * probe).flatten(1).sum(1)
