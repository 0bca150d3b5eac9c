"""`python -m jetflow`: the command line without its script."""

import sys

from jetflow.cli import main

sys.exit(main())
