"""Results on disk, whatever they hold: manifests, lineage, and files and folders that appear whole or not at all."""
