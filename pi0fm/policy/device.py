"""A device's abilities: whether it is there, whether bfloat16 pays there, whether its memory is full.

Owns: the answers for a device, the number of CPU threads. Does not know: models, training.
"""

import torch

from pi0fm.machine import cores
from pi0fm.policy.load_options import PRECISIONS
from pi0fm_client.errors import ConfigError


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it in hardware, else float32. Raises ConfigError for another word."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, found {precision!r}")
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else torch.float32
    return torch.float32


NARROW = 512


def inference_dtype(precision: str, device: torch.device, width: int) -> torch.dtype:
    """`compute_dtype` for a sampler, which multiplies a few rows at a time; width: the backbone's.

    `auto` is float32 for a network narrower than NARROW on a CPU: with so small products the casts cost more than bfloat16 saves
    (62 against 86 ms a chunk of the tiny preset; docs/LOG.md). Training multiplies thousands of rows, and stays with `compute_dtype`.
    """
    if precision == "auto" and device.type == "cpu" and width < NARROW:
        return torch.float32
    return compute_dtype(precision, device)


def set_threads(threads: int | None) -> None:
    """Set torch's CPU threads. None keeps torch's choice, which is all processors of the host, within a container's quota of them."""
    if threads is not None or cores() < torch.get_num_threads():
        torch.set_num_threads(cores() if threads is None else threads)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def choose_device(name: str | None) -> torch.device:
    """The named device, or the best that works: cuda, else cpu. Raises ConfigError when the named one is not there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name is None else _named(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} is not available on this machine; leave it out, or type cpu")
    return device


def _named(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be cpu, cuda or cuda:N, found {name!r}") from None
