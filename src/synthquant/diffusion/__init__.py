"""Diffusion models: the one door to diffusers, and Stable Diffusion in its parts.

- `embedding`: textual-inversion embeddings (arXiv:2208.01618) as safetensors files, in the form that diffusers loads.
- `latent`: Stable Diffusion in its parts: text, latents, denoising, decoding.
- `pipelines`: the one door to diffusers: text-to-image pipelines.
- `text_cache`: text embeddings of a pipeline, computed once for each distinct prompt.
"""
