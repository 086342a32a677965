"""Fixtures of tests that run small on a CPU in the default suite, and on a CUDA device with `-m gpu`."""

from collections.abc import Iterator

import pytest
import torch
from small_policies import observations, small_policy

__all__ = ["device", "observations", "small_policy"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device under test. Products in float32 are float32's, without TF32."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, found none")
    threads = torch.get_num_threads()
    if request.param == "cuda":
        torch.set_num_threads(4)  # what is compared with is computed on the host, in float64
    torch.set_float32_matmul_precision("highest")
    yield torch.device(request.param)
    torch.set_num_threads(threads)
