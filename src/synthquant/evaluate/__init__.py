"""Measure a network: accuracy, agreement with the float network, size and operations."""
