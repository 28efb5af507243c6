"""Networks for whole images: CLIP, HPS v2, DINOv2, an aesthetic predictor and RAFT, with their image preprocessing."""
