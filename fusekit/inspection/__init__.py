"""Looking at models before merging them: measurements, findings and advice."""
