"""What all else stands on: errors, registries, random numbers, progress, files, modules, records, settings.

- `allocator`: glibc's allocator: whether memory that is freed stays with the process.
- `clips`: ReLU6 and other clips whose gradient needs their result alone, as that of ReLU does.
- `cpu`: what the processor can do.
- `device`: which device work is done on.
- `differences`: in what two sets of settings differ, the most telling first, short enough for one line.
- `errors`: every error that is raised on purpose.
- `files`: files that are either wholly there or not there at all, and their hashes.
- `free_memory`: how much memory is free for this process, on a device or in main memory.
- `hub`: the hub where published weights and datasets lie, and what to do where it cannot be reached.
- `locks`: locks of the operating system on folders and temporary files, and what killed processes left behind.
- `memory`: telling that memory ran out from all other errors: every library says it in its own way.
- `method_settings`: sections of plain data that name a method and set its fields.
- `modules`: finding, replacing and watching parts of a network.
- `overrides`: changing nested settings by texts such as `quantize.iterations=500`.
- `plain_yaml`: YAML of recipes and of values on the command line, as plain data and without its traps.
- `processes`: several processes that do one piece of work together.
- `progress`: progress bars and messages; nothing else in the package writes to the terminal.
- `quality_file`: what a comparison of image sets found, for reports and model cards.
- `ranking`: which classes a network puts first: the one rule for ties.
- `record`: what a run did, with what, on what: `run.json`.
- `registry`: tables from a name to the thing that carries it.
- `rng`: one seed, and a named random generator for every purpose.
- `run_folder`: a folder that a flow of stages fills, and that a later call can take up again.
- `run_metrics`: what the stages of a run measured, as `run.json` holds it.
- `settings`: frozen pydantic models whose errors are one line.
- `tensor_file`: safetensors files that carry the hash of their own content.
- `working_folder`: a folder while one process fills it: locked, and gone again if nothing of value came of it.
"""
