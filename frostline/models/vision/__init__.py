"""Networks that look at pictures as a whole: CLIP's two towers, DINOv2, and how pictures are prepared for them."""
