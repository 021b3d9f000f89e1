"""ReLU, batch normalisation and residual sum, and the convolution that reads them, in one op."""
