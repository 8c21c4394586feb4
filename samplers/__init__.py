"""Inversion and sampling in pure PyTorch, on any model that keeps the k-diffusion contract (x, sigma) -> denoised."""
