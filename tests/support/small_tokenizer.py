"""A tokenizer in a directory, used like PaliGemma's: `<bos>` in front, no end token, one token per character."""

from pathlib import Path

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def write(path: Path, size: int = 24) -> Path:
    """Write it to `path` with `size` tokens; characters behind the last are unknown."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ("\n", " ", *"etaoinsrhldcumfpgwybvkxjqz0123456789,:;-TSA")[: size - len(SPECIAL)]
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **names).save_pretrained(path)
    return path
