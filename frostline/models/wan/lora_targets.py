"""The layers of Wan's denoiser that a LoRA adapts unless it is told otherwise."""

# Of every block: the projections of its attentions, and its feed-forward layers.
LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
