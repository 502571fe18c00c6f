"""Students of another shape than their teacher: fewer layers, narrower, fewer key-value heads."""
