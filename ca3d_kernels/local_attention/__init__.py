"""Fused kernels for local temporal attention and float16 pre-parameter training."""
