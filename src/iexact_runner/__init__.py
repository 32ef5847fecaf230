"""Full-batch training of graph neural networks with compressed activation maps."""

__version__ = "0.1.0"
