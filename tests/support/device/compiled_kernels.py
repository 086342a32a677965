"""Program: compile every launch of models/fused.py for a Hopper GPU, at released sizes, on any machine; print the kernels' names.

The interpreter, which tests their numbers on a CPU, knows neither registers nor shared memory, and passes over an argument that no kernel
has.
"""

import json
import sys
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pi0fm.models import fused
from pi0fm.models.layers import AdaptiveRMSNorm, Rotation

HOPPER, SHARED_MEMORY = GPUTarget("cuda", 90, 32), 227 * 1024
OPTIONS = {"num_warps", "num_stages", "launch_pdl"}
KINDS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
compiled: set[str] = set()


def kind(value: Any) -> str:
    """Triton's word for an argument."""
    return KINDS[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"


def compile_only(function: JITFunction, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """In place of a launch."""
    options = {name: named.pop(name) for name in OPTIONS & named.keys()}
    unknown = named.keys() - set(function.arg_names)
    assert not unknown, f"{function.__name__} has no argument {unknown}"
    values = dict(zip(function.arg_names, given, strict=False)) | named
    assert values.keys() == set(function.arg_names), function.__name__
    constants = {parameter.name: values[parameter.name] for parameter in function.params if parameter.is_constexpr}
    signature = {name: "constexpr" if name in constants else kind(value) for name, value in values.items()}
    found = triton.compile(ASTSource(function, signature, constants), target=HOPPER, options=options)
    assert found.metadata.shared <= SHARED_MEMORY, f"{function.__name__}: {found.metadata.shared} bytes of shared memory"
    compiled.add(function.__name__)


def main() -> None:
    """A chunk of 50 actions of one robot, and of many rows; pi0's plain norm and pi0.5's adaptive one."""
    JITFunction.run = compile_only
    fused._overlap = lambda x: {"PDL": True, "launch_pdl": True}
    half = torch.bfloat16
    stream = nn.Module()
    stream.qkv, stream.num_heads = nn.Linear(1024, 2560, bias=False, dtype=half), 8
    norm, out = AdaptiveRMSNorm(1024, 1024), nn.Linear(2048, 1024, bias=False, dtype=half)
    by, bias = norm.modulate(torch.zeros(1, 1024)), torch.zeros(1, 1, 1, 867)
    with torch.no_grad():
        for tokens, few in ((50, True), (96, False)):
            x, attended = torch.zeros(1, tokens, 1024), torch.zeros(1, tokens, 2048, dtype=half)
            parts = fused.product(attended, out, few)
            normed = fused.add_norm(x, parts, by.gate, norm, by, half)[1]
            cached = fused.Cached(torch.zeros(1, 1, 867, 256, dtype=half), torch.zeros(1, 1, 867, 256, dtype=half), 867 - tokens)
            angles = torch.zeros(1, 1, tokens, 256)
            query = fused.rotated_qkv(normed, stream, Rotation(angles, angles), cached, few)
            fused.attend_in_slices(query, cached, bias, 0, tokens)
            fused.gated_product(normed, nn.Linear(1024, 8192, bias=False, dtype=half), "tanh", few)
            fused.head(x, parts, by.gate, norm, by, nn.Linear(1024, 32), 0)
        fused.add_layer_norm(torch.zeros(1, 256, 1152), torch.zeros(1, 256, 1152, dtype=half), nn.LayerNorm(1152), half)
    sys.stdout.write(json.dumps(sorted(compiled)) + "\n")


if __name__ == "__main__":
    main()
