"""Results on disk: manifests, lineage, and atomic writes of files and folders."""
