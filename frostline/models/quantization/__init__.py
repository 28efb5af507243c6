"""Store frozen weights in 8 or 4 bits, and dequantise them when they are used."""
