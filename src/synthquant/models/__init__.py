"""Float networks: opening them, following tensors through them, batch norm, and the units they fall into."""
