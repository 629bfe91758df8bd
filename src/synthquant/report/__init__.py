"""One self-contained HTML page out of the files of run folders.

- `figures`: figures of the report as SVG text, the door to matplotlib.
- `html`: the page about runs or a selection.
- `quality`: the part of the page about drawn images, and pairs of the same seed.
- `run_files`: the files of a run folder, as the report reads them.
- `selection`: the part of the page about a selection of images, from the files that the selection left.
- `sheet`: contact sheets: a few images of a set as thumbnails inside the page.
- `side_by_side`: the part of the page about several runs: one table of accuracy, and what differs between them.
- `svg`: from the SVG that a drawing library writes to an element of the page.
"""
