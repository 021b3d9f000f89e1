"""`python -m ca3d` is the `ca3d` command."""

import sys

from ca3d.cli import main

sys.exit(main())
