"""One self-contained HTML page out of the files of run folders."""
