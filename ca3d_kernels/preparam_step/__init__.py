"""Training of float16 pre-parameters: maps, the SGD step over all tensors, and the autograd op."""
