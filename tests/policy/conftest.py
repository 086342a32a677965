"""The small policy of the tests of bundles and conversion."""

from small_policies import character_tokenizer, observations, saved, small_policy

__all__ = ["character_tokenizer", "observations", "saved", "small_policy"]
