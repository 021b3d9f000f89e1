"""The map of each head to queries, keys and values and the attention after it, as one op."""
