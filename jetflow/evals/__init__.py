"""What is measured of a trained flow."""
