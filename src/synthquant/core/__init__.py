"""What all else stands on: errors, registries, random numbers, progress, files, modules, records, settings."""
