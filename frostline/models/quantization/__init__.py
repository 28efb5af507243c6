"""Frozen weights in 8 or 4 bits, dequantised where they are used."""
