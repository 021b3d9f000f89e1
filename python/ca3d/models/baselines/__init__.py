"""The models that the paper compares CA3D with, one file each; `ca3d.models.create` builds them."""
