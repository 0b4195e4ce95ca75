"""One checkpoint format for every engine: tensor fragments, a manifest with hashes, a commit marker."""
