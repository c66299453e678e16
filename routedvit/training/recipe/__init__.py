"""What training does to weights, images and rates, step by step."""
