"""From patient volumes to shards: layouts, NIfTI and array reading, splits, packing."""
