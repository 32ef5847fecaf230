"""Several processes that train one graph: who they are, which rows each has, and what they send each other."""
