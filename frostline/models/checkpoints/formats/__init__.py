"""Formats of Wan checkpoints: detect and convert the tensor names of Wan's releases and of diffusers."""
