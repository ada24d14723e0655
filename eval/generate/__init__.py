"""End-to-end decoding speed, ours beside transformers', on one GPU."""
