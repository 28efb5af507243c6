"""The text encoder on batches of prompts compared with diffsynth's own encoder on each prompt."""

from types import SimpleNamespace

import pytest
import torch
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.pipelines.wan_video import WanVideoUnit_PromptEmbedder
from torch import Tensor

from frostline.models.checkpoints.loading import load_components
from frostline.models.wan.components import WanComponents
from frostline.models.wan.text import TextEncoder, count_tokens, tokenize

PROMPTS = ("a person nods", "a person turns the head to the left", "a", "a person moves closer to the camera")


@pytest.fixture(scope="module")
def tiny() -> WanComponents:
    return load_components("tiny")


@torch.no_grad()
def encode(components: WanComponents, *prompts: str) -> Tensor:
    return TextEncoder(components.text_encoder)(*tokenize(components.tokenizer, prompts))


def test_a_batch_is_each_prompt_alone(tiny: WanComponents) -> None:
    together = encode(tiny, *PROMPTS)
    assert together.shape == (4, tiny.text_length, 64)
    for prompt, context in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(context, encode(tiny, prompt)[0], atol=1e-6, rtol=0)


def test_is_zero_past_the_end_and_only_there(tiny: WanComponents) -> None:
    _, mask = tokenize(tiny.tokenizer, PROMPTS)
    assert len(set(mask.sum(1).tolist())) == len(PROMPTS), "the prompts must differ in length"
    context = encode(tiny, *PROMPTS)
    assert torch.equal(context.abs().amax(-1) > 0, mask.bool())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_equals_diffsynth_on_one_prompt(tiny: WanComponents, prompt: str) -> None:
    pipe = SimpleNamespace(tokenizer=tiny.tokenizer, text_encoder=tiny.text_encoder, device="cpu")
    with torch.no_grad():
        theirs = WanVideoUnit_PromptEmbedder().encode_prompt(pipe, prompt)
    torch.testing.assert_close(encode(tiny, prompt), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shared_pos", [False, True])
def test_equals_diffsynth_with_either_kind_of_position_bias(shared_pos: bool) -> None:
    torch.manual_seed(0)
    sizes = {"vocab": 32, "dim": 32, "dim_attn": 32, "dim_ffn": 64, "num_heads": 2, "num_layers": 2, "num_buckets": 8}
    model = WanTextEncoder(**sizes, shared_pos=shared_pos, dropout=0.0).eval()
    ids, mask = torch.randint(0, 32, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    with torch.no_grad():
        torch.testing.assert_close(TextEncoder(model)(ids, mask), model(ids, mask), atol=1e-6, rtol=0)


def test_a_prompt_that_is_too_long_is_cut(tiny: WanComponents) -> None:
    ids, mask = tokenize(tiny.tokenizer, [" ".join(["person"] * 100)])
    assert ids.shape == (1, tiny.text_length)
    assert mask.all()


def test_fp16_stays_finite_where_diffsynth_clamps() -> None:
    """Overflow half precision in a feed-forward layer: both encoders clamp to the same bound."""
    torch.manual_seed(0)
    sizes = {"vocab": 32, "dim": 32, "dim_attn": 32, "dim_ffn": 64, "num_heads": 2, "num_layers": 2, "num_buckets": 8}
    model = WanTextEncoder(**sizes, dropout=0.0).eval()
    with torch.no_grad():
        model.blocks[0].ffn.fc2.weight.mul_(3e4)
        model.half()
        ids, mask = torch.randint(0, 32, (1, 12)), torch.ones(1, 12, dtype=torch.int64)
        tokens = model.token_embedding(ids)
        assert torch.isinf(model.blocks[0].ffn(model.blocks[0].norm2(tokens))).any()
        ours, theirs = TextEncoder(model)(ids, mask), model(ids, mask)
    assert torch.isfinite(theirs).all()
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2)


def test_tokens_are_counted_beyond_what_the_encoder_takes(tiny: WanComponents) -> None:
    long = "a person nods " * 200
    ids, mask = tokenize(tiny.tokenizer, [long])
    assert mask.all() and ids.shape[1] == tiny.text_length
    assert count_tokens(tiny.tokenizer, long) == 601
    for prompt in PROMPTS:
        assert count_tokens(tiny.tokenizer, prompt) == tokenize(tiny.tokenizer, [prompt])[1].sum()
