"""The small policy whose bundle is converted."""

from small_policies import character_tokenizer, observations, saved, small_policy

__all__ = ["character_tokenizer", "observations", "saved", "small_policy"]
