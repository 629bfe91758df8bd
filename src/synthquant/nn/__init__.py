"""Quantizers, quantized layers and the quantized copy of a network."""
