"""Which token belongs to which region: semantic maps, masks, and what is computed region by region.

Pure PyTorch; imports nothing else of the pack."""
