"""The manifest: one YAML file, checked."""
