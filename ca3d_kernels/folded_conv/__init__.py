"""Convolution, ReLU, folded normalisation and residual sum in one step, for inference."""
