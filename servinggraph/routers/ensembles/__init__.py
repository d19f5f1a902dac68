"""What the `ensemble` router is made of: waiting for members, their weights, and rules that make one answer of several."""
