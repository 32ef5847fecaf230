"""What runs find out beside scores: how close gradients are, how maps are distributed."""
