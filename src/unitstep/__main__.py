"""`python -m unitstep` is the command `unitstep`."""

import sys

from unitstep.cli import main

sys.exit(main())
