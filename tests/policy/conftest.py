"""The small policy that a bundle and a conversion are tried on."""

from small_policies import character_tokenizer, observations, saved, small_policy

__all__ = ["character_tokenizer", "observations", "saved", "small_policy"]
