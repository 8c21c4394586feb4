"""What talks to a ComfyUI server: find one, start it, queue graphs, follow them, fetch what they made."""
