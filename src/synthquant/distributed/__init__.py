"""Work over several processes and machines.

- `ray_cluster`: a Ray cluster: workers, work in order, workers that are lost.
- `ray_selection`: the forward pass of selection over a Ray cluster.
- `ray_synthesis`: text-to-image synthesis over a Ray cluster.
- `ray_trajectory`: recording a diffusion model's trajectory over a Ray cluster.
- `ray_workers`: where work is spread: the workers of a Ray cluster.
"""
