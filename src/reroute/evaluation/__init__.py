"""Questions, datasets and the scoring of bundles."""
