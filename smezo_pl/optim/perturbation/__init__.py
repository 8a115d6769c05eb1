"""How a forward sees the perturbed weights ``theta + eps * m * z``: layer by layer, or in place."""
