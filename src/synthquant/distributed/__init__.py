"""Work over several processes and machines."""
