"""The ExecuTorch side of `ca3d export`."""
