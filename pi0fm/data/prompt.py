r"""Tokenisation of an instruction.

Owns: the prompt's dialects and the tokenizer. Does not know: embeddings, robots.

    "pick_up\n it "     pi0: the state is a token    pi0.5: the state is in the prompt
    openpi             "pick up  it\n"              "Task: pick up  it, State: 12 -1 255;\nAction: "
    lerobot            "pick_up\n it \n"            "Task: pick up  it, State: 12 -1 255;\nAction: "
    openpi_stateless   refused                      "pick up  it\n"

A policy must be asked in the dialect that it was trained in. openpi's own pi05_libero is stateless.
`byt5` is transformers' byte tokenizer and needs no file; any other name is a directory with a tokenizer, such as
PaliGemma's, which is gated and never downloaded here.
"""

from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pi0fm.files import missing, nearest_path
from pi0fm.options import nearest
from pi0fm_client.errors import ConfigError, ObservationError

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

BYTES = "byt5"
OPENPI, LEROBOT, STATELESS = "openpi", "lerobot", "openpi_stateless"
DIALECTS = (OPENPI, LEROBOT, STATELESS)


def load_tokenizer(name: str, vocab_size: int) -> "PreTrainedTokenizerBase":
    """Load `byt5`, or the tokenizer in a local directory. Raises ConfigError when it is missing or does not fit the embedding."""
    # imported here: the imports take seconds, which reading a configuration and the other tokenizer do not need
    if name == BYTES:
        from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer

        tokenizer: PreTrainedTokenizerBase = ByT5Tokenizer()
    else:
        refuse_missing_tokenizer(name)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"tokenizer {name!r} has {len(tokenizer)} tokens, but the model embeds {vocab_size}; choose a larger model.vocab_size"
        )
    return tokenizer


def refuse_missing_tokenizer(name: str) -> None:
    """Raise ConfigError for a name that is neither `byt5` nor a directory with a tokenizer."""
    if name != BYTES and not (Path(name) / "tokenizer_config.json").is_file():
        instead = "PaliGemma's is gated: accept its licence, download google/paligemma-3b-pt-224 and give the directory"
        if nearest_path(Path(name)) is not None and not Path(name).exists():
            instead = missing(Path(name))
        raise ConfigError(f"tokenizer must be 'byt5' or a directory with tokenizer_config.json, found {name!r}; {instead}")


class PromptTokenizer:
    """Instructions -> ids [B, L] and mask [B, L], padded to max_tokens; each distinct text is tokenised once.

    with_state: pi0.5's form, which writes the normalised state into the prompt, one of 256 bins per dimension.
    dialect: one of DIALECTS, see above. Raises ConfigError for an unknown one, and for one that would leave the network without state.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int, with_state: bool = False, dialect: str = OPENPI) -> None:
        refuse_dialect(dialect, with_state)
        self.tokenizer, self.max_tokens, self.with_state, self.dialect = tokenizer, max_tokens, with_state, dialect
        self._encode = lru_cache(maxsize=4096)(self._encode_one)

    def __reduce__(self) -> "tuple[type[PromptTokenizer], tuple[PreTrainedTokenizerBase, int, bool, str]]":
        """Pickle without the table of known texts, which stays in this process."""
        return PromptTokenizer, (self.tokenizer, self.max_tokens, self.with_state, self.dialect)

    @cached_property
    def max_bytes(self) -> int:
        """Largest size in bytes of an instruction of `max_tokens` tokens: `max_tokens` times the longest token."""
        return self.max_tokens * max(len(token.encode()) for token in self.tokenizer.get_vocab())

    def __call__(self, prompts: list[str], state: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokenise prompts and normalised states [B, S] to (ids, mask), each [B, L].

        Raises ObservationError for a prompt that does not fit: it is never cut silently.
        """
        rows = [self._encode(self.text(prompt, row)) for prompt, row in zip(prompts, state, strict=True)]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])

    def text(self, prompt: str, state: NDArray[np.float32]) -> str:
        """Text that is tokenised for one instruction and its normalised state [S].

        Raises ObservationError for an empty instruction, and for one of more than `max_bytes`, which would take minutes.
        """
        size = len(prompt) if len(prompt) > self.max_bytes else len(prompt.encode(errors="replace"))
        if size > self.max_bytes:
            raise ObservationError(f"the prompt must fit into {self.max_tokens} tokens, found {size} bytes: {prompt[:60]!r}; shorten it")
        if not clean(prompt).strip():
            raise ObservationError(f"the prompt must say something, found {prompt!r}")
        if self.with_state and self.dialect != STATELESS:
            return f"Task: {clean(prompt)}, State: {bins(state)};\nAction: "
        if self.dialect == LEROBOT:
            return prompt if prompt.endswith("\n") else prompt + "\n"
        return clean(prompt) + "\n"

    def length(self, prompt: str, state: NDArray[np.float32]) -> int:
        """Number of tokens of one instruction and its normalised state [S]. Raises ObservationError for an empty instruction."""
        return len(self._ids(self.text(prompt, state)))

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id, *ids]

    def _encode_one(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        ids = self._ids(text)
        if len(ids) > self.max_tokens:
            raise ObservationError(f"the prompt must fit into {self.max_tokens} tokens, found {len(ids)}: {text!r:.120}; shorten it")
        padded = np.zeros(self.max_tokens, dtype=np.int64)
        padded[: len(ids)] = ids
        return padded, np.arange(self.max_tokens) < len(ids)


def bins(state: NDArray[np.float32]) -> str:
    """Write a state as numbers of 256 equal bins of [-1, 1]: -1 below, 255 in the last bin and beyond (openpi's convention)."""
    return " ".join(map(str, bin_numbers(state).tolist()))


def bin_numbers(state: NDArray[np.float32]) -> NDArray[np.int64]:
    """Bin numbers of `bins`, in the shape of `state`."""
    return np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1


def clean(prompt: str) -> str:
    """Strip, then replace each underscore and line end by a space; spaces are not merged, as in training of released weights."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def refuse_dialect(dialect: str, with_state: bool) -> None:
    """Raise ConfigError for a dialect that does not exist, or that does not fit where the network takes its state."""
    if dialect not in DIALECTS:
        raise ConfigError(f"prompt_dialect must be a known word, found {dialect!r}: {nearest(dialect, DIALECTS)}")
    if dialect == STATELESS and not with_state:
        raise ConfigError(
            "prompt_dialect openpi_stateless leaves the state out of the prompt, found a network whose state is a separate token; "
            "type --prompt_dialect openpi"
        )
