"""``python -m holdfast`` is the command ``holdfast``."""

import sys

from holdfast.launch.cli import main

if __name__ == "__main__":  # worker processes import this module again under another name
    sys.exit(main())
