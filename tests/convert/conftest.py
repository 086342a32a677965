"""The small policy that a bundle and a conversion are tried on, and disks that are too small for them."""

from small_disks import small_disk, unwritable
from small_policies import character_tokenizer, observations, saved, small_policy

__all__ = ["character_tokenizer", "observations", "saved", "small_disk", "small_policy", "unwritable"]
