"""The layers of Wan's denoiser that a LoRA adapts by default."""

# In every block: the projections of the attention layers, and the feed-forward layers.
LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
