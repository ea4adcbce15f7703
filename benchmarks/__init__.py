"""Speed and memory, as ratios to copying the same bytes in the same run."""
