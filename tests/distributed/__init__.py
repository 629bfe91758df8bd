"""Tests on a real Ray; a package, so that its cluster stops after the last of them."""
