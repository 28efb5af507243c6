"""What rewards have in common whose network sees each frame as a whole, as CLIP and DINOv2 do."""
