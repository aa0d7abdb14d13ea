"""``python -m ce_plugin`` is the command ``ce-plugin``."""

import sys

from ce_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
