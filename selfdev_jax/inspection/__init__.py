"""Questions to an archive, and their answers as text."""
