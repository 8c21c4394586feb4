"""What is kept on disk: inversions and embeddings."""
