"""The host's side of the samplers: the only folder besides nodes/ that imports comfy."""
