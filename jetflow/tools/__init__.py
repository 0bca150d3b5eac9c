"""What people run around a trained flow."""
