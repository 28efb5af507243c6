"""Write a word tokenizer for the tiny model in the format of `HuggingfaceTokenizer`."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


def write_tokenizer(folder: Path, prompts: Sequence[str]) -> None:
    """Write a tokenizer with the words of `prompts`, which pads on the right and adds an end token, like umT5's."""
    words = sorted({word for prompt in prompts for word in prompt.lower().split()})
    vocabulary = {token: index for index, token in enumerate((_PAD, _END, _UNKNOWN, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"$A {_END}", special_tokens=[(_END, vocabulary[_END])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, padding_side="right"
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(str(folder))
