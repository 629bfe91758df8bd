"""Write a quantized network to files and read it back."""
