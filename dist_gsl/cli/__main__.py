"""`python -m dist_gsl.cli`, where the command is not on the path."""

import sys

from dist_gsl.cli import main

sys.exit(main())
