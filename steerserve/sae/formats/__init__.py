"""A loader for each format in which SAEs are published, and the writer of SAELens' format."""
