"""What is made from rewritten graphs to be used outside of this package."""
