"""Common code of rewards whose network processes whole frames, such as CLIP and DINOv2."""
