"""What `make demo` runs: the demo graphs, and the contact sheet of what they make."""
