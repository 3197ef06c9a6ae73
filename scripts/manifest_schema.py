"""Writes the JSON Schema of manifests, for editors that complete and check YAML.

python -m scripts.manifest_schema [FILE] default: manifests/manifest.schema.json

In a manifest's first line: `# yaml-language-server: $schema=manifest.schema.json`.
"""

import json
import sys
from pathlib import Path

from onelayer.runtime.manifest.manifest import manifest_schema

SCHEMA = Path(__file__).parent.parent / "manifests" / "manifest.schema.json"


def main() -> None:
    """Write the schema."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else SCHEMA
    file.write_text(json.dumps(manifest_schema(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
