"""`python -m diffadapt` is the `diffadapt` command."""

import sys

from diffadapt.cli import main

sys.exit(main())
