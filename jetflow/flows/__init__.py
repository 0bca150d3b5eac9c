"""The mathematics: invertible layers with explicit log-determinants, and the flows made of them."""
