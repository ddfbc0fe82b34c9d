"""What all scripts share around their training loops."""
