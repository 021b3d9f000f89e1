"""The temporal half of a CAST block with folded normalisations as one op, for inference."""
