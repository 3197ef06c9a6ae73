"""From a manifest to executed steps."""
