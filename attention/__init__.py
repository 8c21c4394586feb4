"""Pure PyTorch building blocks on labelled feature maps and latents. Imports nothing else of the pack."""
