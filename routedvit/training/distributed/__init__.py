"""What ranks agree on, and how they part."""
