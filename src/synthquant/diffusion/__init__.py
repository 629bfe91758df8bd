"""Diffusion models: the one door to diffusers, its pipelines, and Stable Diffusion in its parts.

- `denoiser`: a diffusion pipeline opened as a network: its denoiser, with the pipeline around it.
- `embedding`: textual-inversion embeddings (arXiv:2208.01618) as safetensors files, in the form that diffusers loads.
- `latent`: Stable Diffusion in its parts: text, latents, denoising, decoding.
- `library`: the one door to diffusers: its classes, its schedulers, and pipelines as they are loaded.
- `pipelines`: pipelines of diffusers, opened by name: conditions and seeds to images and to what denoisers saw.
- `quantized`: which folders hold a quantized pipeline, and how one is loaded, saved and started anew for each image.
- `recording`: what a sampler really gives its denoiser: calls in one form, watched while a pipeline draws.
- `text_cache`: text embeddings of a pipeline, computed once for each distinct prompt.
- `text_to_image`: text-to-image pipelines, whose prompts may hold learned tokens.
- `trajectory`: a denoiser's own calibration data: what its sampler gave it, of some images at some steps.
- `trajectory_form`: one part of a trajectory as a file: what a denoiser was given of some images, each value once.
- `trajectory_manifest`: what a trajectory says about itself: `trajectory.json`.
- `trajectory_writer`: writing a trajectory while it is being recorded, part by part.
"""
