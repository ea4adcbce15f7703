"""From a plan to finished tensors: summaries, blocks, threads, resume and verification."""
