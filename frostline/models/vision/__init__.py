"""Networks for whole pictures: CLIP's two towers, DINOv2, and the preparation of their input."""
