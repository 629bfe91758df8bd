"""Diffusion models: the one door to diffusers, and Stable Diffusion in its parts."""
