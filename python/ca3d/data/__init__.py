"""Video reading, data sets, sampling and transforms."""
