"""The spellings of Wan checkpoints: tensor names of Wan's own release and of diffusers, recognised and converted."""
